"""What Prometheus scrapes of a real gateway over HTTP, and the log lines that it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.h2o_gateway.process import GatewayProcess

Launch = Callable[..., GatewayProcess]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(gateway: GatewayProcess) -> Samples:
    answer = httpx.get(f"{gateway.url}/metrics")
    assert answer.status_code == 200, "it needs no key"
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def of(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return f"h2o_gateway_{name}", tuple(sorted(labels.items()))


def test_experiments_requests_and_the_queue_are_counted_and_experiments_outlive_the_gateway(launch: Launch) -> None:
    gateway = launch()
    before = scrape(gateway)
    for status in ("queued", "running", "finished", "failed", "stopped"):
        assert before[of("experiments", status=status)] == 0
    assert before[of("working")] == before[of("devices")] == 1
    done, failed = gateway.create("quick").json()["id"], gateway.create("fail").json()["id"]
    gateway.wait(done, "finished")
    gateway.wait(failed, "failed")
    held, waiting = gateway.create("wait").json()["id"], gateway.create("wait 2").json()["id"]
    gateway.wait(held, "running")
    assert httpx.get(f"{gateway.url}/api/experiments").status_code == 401
    assert gateway.http.get("/no/such/path/of-mine").status_code == 404
    seen = scrape(gateway)
    for status in ("queued", "running", "finished", "failed"):
        assert seen[of("experiments", status=status)] == 1
    assert seen[of("training_seconds_count", status="finished")] == 1
    assert 0 < seen[of("training_seconds_sum", status="finished")] < 60
    assert seen[of("queue_seconds_count")] == 3
    assert seen[of("oldest_queued_seconds")] > 0
    created = of("requests_total", method="POST", route="/api/experiments", code="201")
    assert seen[created] == 4
    assert seen[of("requests_total", method="GET", route="none", code="401")] == 1
    assert seen[of("requests_total", method="GET", route="none", code="404")] == 1
    assert seen[of("request_seconds_count", method="POST", route="/api/experiments")] == 4
    names = str(list(seen))
    assert not any(each in names for each in (done, failed, held, waiting, "of-mine"))

    gateway.kill()
    gateway.start()
    again = scrape(gateway)
    assert again[of("training_seconds_sum", status="finished")] == seen[of("training_seconds_sum", status="finished")]
    assert again[of("experiments", status="finished")] == 1
    assert created not in again, "requests are counted by each process from the start"


def test_log_lines_are_json_that_names_the_experiment_and_hold_no_key(launch: Launch) -> None:
    gateway = launch(LOG_FORMAT="json")
    identifier = gateway.create("fail", key="brain-r1").json()["id"]
    gateway.wait(identifier, "failed")
    lines = [json.loads(line) for line in gateway.said().splitlines()]
    [began, failed] = [line for line in lines if line.get("experiment") == identifier]
    assert (began["level"], began["logger"], began["run_id"]) == ("INFO", "h2o_gateway.supervisor", "brain-r1")
    assert began["message"].startswith(f"{identifier} begins on device 0")
    assert (failed["level"], failed["attempt"], failed["device"]) == ("WARNING", 1, "0")
    assert "has failed: the training's process has ended unfinished" in failed["message"]
    assert gateway.settings["API_KEY"] not in gateway.said()
