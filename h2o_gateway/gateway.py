"""The service's parts, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from h2o_gateway.datasets import Datasets
from h2o_gateway.models import Experiment
from h2o_gateway.progress import read_progress
from h2o_gateway.settings import Settings
from h2o_gateway.store import Row, Store
from h2o_gateway.supervisor import Supervisor
from h2o_gateway.webhooks import Webhook

_TAIL_LINES = 20
_TAIL_CHARACTERS = 8000


class Gateway:
    """What the routes work with.

    Args:
        settings: the gateway's.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.data_dir / "gateway.db", callbacks=settings.webhook_url is not None)
        self.datasets = Datasets(settings.data_dir / "datasets")
        self.supervisor = Supervisor(settings, self.store, self.datasets)
        self.webhook = (
            Webhook(
                self.store,
                url=settings.webhook_url,
                secret=settings.webhook_secret.get_secret_value(),
                give_up=settings.webhook_give_up_seconds,
            )
            if settings.webhook_url and settings.webhook_secret
            else None
        )

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """The threads work inside of the block."""
        self.supervisor.start()
        if self.webhook:
            self.webhook.start()
        yield
        await run_in_threadpool(self.supervisor.close)
        if self.webhook:
            await run_in_threadpool(self.webhook.close)

    def shown(self, row: Row, *, log: bool = True) -> Experiment:
        """The experiment with what the disk says of it."""
        attempt = self.supervisor.attempt(row)
        progress = read_progress(attempt.output, row.request.config)
        metrics = {}
        if progress.points:
            metrics = {"loss": progress.points[-1].loss, "learning_rate": progress.points[-1].learning_rate}
        # Not before the end: a figure that always grows would look like progress.
        if row.started_at is not None and row.finished_at is not None:
            metrics["gpu_hours"] = (row.finished_at - row.started_at) / 3600
        base = self.settings.public_url
        return Experiment(
            id=row.id,
            idempotency_key=row.idempotency_key,
            name=row.request.name,
            status=row.status,
            queue_position=1 + self.store.count("queued", before=row.position) if row.status == "queued" else None,
            gpu=row.gpu,
            attempt=row.attempt,
            step=progress.step,
            total_steps=progress.total_steps,
            metrics=metrics,
            error=row.error,
            log_tail="\n".join(attempt.log_lines(_TAIL_LINES))[-_TAIL_CHARACTERS:] if log else "",
            dataset_id=row.request.dataset_id,
            base_model=row.request.base_model,
            sha256=row.sha256,
            bytes=row.bytes,
            url=f"{base.rstrip('/')}/api/experiments/{row.id}" if base else "",
            created_at=_time(row.created_at),
            started_at=None if row.started_at is None else _time(row.started_at),
            finished_at=None if row.finished_at is None else _time(row.finished_at),
        )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
