"""What Prometheus is told: requests as this process counts them, experiments as the database has them.

Figures of experiments outlive the gateway, and are the same after a restart. No label tells of a single
experiment or client: methods, routes, codes and statuses are few.
"""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from h2o_gateway.gateway import Gateway

_PREFIX = "h2o_gateway"
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
# Seconds: a look at an experiment takes milliseconds, the upload of a large dataset minutes.
_BUCKETS = (0.005, 0.025, 0.1, 0.5, 1, 5, 30, 120, 600)


class Measured:
    """ASGI middleware that counts requests and takes their time.

    Args:
        app: what is measured.
        registry: where the figures are kept.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        labels = ["method", "route"]
        self._requests = Counter(f"{_PREFIX}_requests", "Requests answered.", [*labels, "code"], registry=registry)
        self._seconds = Histogram(
            f"{_PREFIX}_request_seconds", "Until an answer was sent whole.", labels, buckets=_BUCKETS, registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Measure one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        code = 500
        began = time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            # Known once it was found; a path that is none, or a client that is refused, gives no label of its own.
            route: Any = scope.get("route")
            path = getattr(route, "path", "none")
            self._requests.labels(method, path, str(code)).inc()
            self._seconds.labels(method, path).observe(time.perf_counter() - began)


class Experiments(Collector):
    """The experiments, as the database has them at the moment.

    Args:
        gateway: whose they are.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        tally = self._gateway.store.tally()
        experiments = GaugeMetricFamily(f"{_PREFIX}_experiments", "Experiments by status.", labels=["status"])
        trained = SummaryMetricFamily(
            f"{_PREFIX}_training_seconds", "How long trainings took that have ended.", labels=["status"]
        )
        for status, row in tally.by_status.items():
            experiments.add_metric([status], row.experiments)
            trained.add_metric([status], row.trained, row.seconds)
        yield experiments
        yield trained
        yield SummaryMetricFamily(
            f"{_PREFIX}_queue_seconds", "How long experiments waited for a device.", tally.started, tally.waited
        )
        oldest = 0.0 if tally.oldest_queued is None else max(0.0, time.time() - tally.oldest_queued)
        yield GaugeMetricFamily(f"{_PREFIX}_oldest_queued_seconds", "How long the oldest has been waiting.", oldest)
        slots = len(self._gateway.settings.slots)
        yield GaugeMetricFamily(f"{_PREFIX}_devices", "Devices that train.", slots)
        yield GaugeMetricFamily(f"{_PREFIX}_callbacks_waiting", "Webhook calls to be delivered.", tally.callbacks)
        working = self._gateway.supervisor.is_working
        yield GaugeMetricFamily(f"{_PREFIX}_working", "1 while experiments are looked after, else 0.", working)
