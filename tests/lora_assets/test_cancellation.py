"""Cancelled runs whose experiments run elsewhere: a real gateway that is down, then up; real rows."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import httpx
import pytest

from finetune.base_model.models import BaseModelRef
from lora_assets.cancellation import STILL_RUNS
from lora_assets.definitions import cancel_rows, close_what_was_killed
from lora_assets.settings import load_settings
from resources.postgres import EmbeddedPostgres
from resources.run_log import Facts, RunLog
from sensors.run_failure import CANCELLED
from tests.e2e.conftest import data_root
from tests.h2o_gateway import process
from tests.h2o_gateway.process import GatewayProcess, is_alive, until
from tests.resources.h2o_server import KEY, H2OServer, says
from tests.resources.h2o_training import FAST
from tests.resources.webhook_server import WebhookServer


@dg.job
def train() -> None: ...


@dataclass
class Site:
    """A data root with its database, and Dagster's history."""

    root: Path
    postgres: EmbeddedPostgres
    instance: dg.DagsterInstance
    log: RunLog

    def start(self, training: str, date: str = "2026-06-01") -> tuple[int, str]:
        """A row of a run that is under way; returns the row's id and the run's."""
        run = self.instance.create_run_for_job(train)
        facts = Facts(run_id=training, dataset_paths=["a"], base_model="tiny", backend="h2o", date=date)
        return self.log.start(**facts, dagster_run_id=run.run_id), run.run_id

    def cancelled(self, training: str, date: str = "2026-06-01") -> int:
        """A row that still says RUNNING, of a run that was cancelled when its step was dead."""
        row, run_id = self.start(training, date)
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        self.instance.report_run_canceled(run)
        return row

    def look(self) -> list[str]:
        """What the sensor does at every tick; all that it knows comes from the disk."""
        return close_what_was_killed(load_settings(), self.instance)

    def error_of(self, row: int) -> str:
        [found] = [each for each in self.log.recent() if each.id == row]
        assert found.status == "FAILED"
        return found.error_message or ""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with data_root() as root, dg.DagsterInstance.ephemeral() as instance:
        root.mkdir(parents=True)
        postgres = EmbeddedPostgres(root / "postgres")
        log = RunLog(database_url=postgres.url, data_dir=str(root))
        for name, value in {
            "DATA_ROOT": str(root),
            "DATABASE_URL": postgres.url,
            "TRAINING_BACKEND": "h2o",
            "H2O_TIMING": json.dumps({**FAST, "cancel_budget": 0.2}),
        }.items():
            monkeypatch.setenv(name, value)
        yield Site(root, postgres, instance, log)
        log.close()
        postgres.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[H2OServer]:
    server = H2OServer()
    monkeypatch.setenv("H2O_API_URL", server.url)
    monkeypatch.setenv("H2O_API_KEY", KEY)
    yield server
    server.close()


def test_an_experiment_whose_gateway_was_down_when_its_run_was_cancelled_ends_once_it_is_up_again(
    site: Site, tiny_model: BaseModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = GatewayProcess(site.root.parent / "gateway", tiny_model.path, STOP_GRACE_SECONDS="0.5")
    try:
        monkeypatch.setenv("H2O_API_URL", gateway.url)
        monkeypatch.setenv("H2O_API_KEY", process.KEY)
        gateway.settings["PORT"] = str(httpx.URL(gateway.url).port)
        # Named so that it trains until it is told otherwise; its key is our training id.
        experiment = gateway.create("wait", "wait").json()["id"]
        gateway.started(experiment)
        pid = gateway.pid(experiment)
        row = site.cancelled("wait")
        gateway.kill()

        closed, left = site.look()
        assert closed == f"closed row {row}"
        assert left.startswith(f"row {row}: {STILL_RUNS}: the H2O server could not be worked with")
        [left] = site.look()
        assert site.error_of(row).startswith(STILL_RUNS)
        assert is_alive(pid)

        gateway.start()
        assert site.look() == []
        assert site.error_of(row) == f"{CANCELLED}; its experiment was cancelled"
        assert gateway.wait(experiment, "stopped", "finished", "failed")["status"] == "stopped"
        until(lambda: not is_alive(pid))
    finally:
        gateway.close()


def test_of_two_cancelled_runs_people_are_told_though_the_server_is_away_and_neither_keeps_the_other_waiting(
    site: Site, server: H2OServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook = WebhookServer()
    monkeypatch.setenv("ALERT_WEBHOOK_URL", webhook.url)
    try:
        server.faults["list"] = [says(503)] * 1000
        rows = [site.cancelled(f"r{day}", f"2026-06-0{day}") for day in (1, 2)]
        *closed, left = site.look()
        assert closed == [f"closed row {row}" for row in rows]
        assert STILL_RUNS in left
        assert len(webhook.texts) == 2
        assert len(server.faults["list"]) < 1000, "otherwise the fault did not strike"
        server.faults["list"].clear()
        assert site.look() == []
        assert {site.error_of(row) for row in rows} == {
            f"{CANCELLED}; it has no experiment, or the server cannot cancel it"
        }
    finally:
        webhook.close()


@pytest.mark.parametrize("end", ["RUNNING", "COMPLETED", "FAILED"])
def test_an_experiment_that_another_run_has_taken_up_since_is_left_to_it(
    site: Site, server: H2OServer, end: str
) -> None:
    server.faults["list"] = [says(503)] * 1000
    row = site.cancelled("r1")
    site.look()
    taken, _ = site.start("r1")
    if end == "COMPLETED":
        site.log.complete(taken, None, {})
    elif end == "FAILED":
        site.log.fail(taken, "the step was interrupted")
    assert [each.status for each in site.log.recent() if each.id == taken] == [end]
    server.faults["list"].clear()
    asked = len(server.calls)
    assert site.look() == []
    assert len(server.calls) == asked
    assert site.error_of(row).startswith(STILL_RUNS)


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, f"{STILL_RUNS}: the H2O server refuses the key"), (409, f"{CANCELLED}; its experiment cannot be: ")],
)
def test_a_wrong_key_can_be_set_right_but_a_refusal_is_an_answer(
    site: Site, server: H2OServer, status: int, said: str
) -> None:
    server.faults["list"] = [says(status)]
    row, run_id = site.start("r1")
    assert [each.id for each in cancel_rows(load_settings(), run_id, CANCELLED)] == [row]
    assert not server.faults["list"], "otherwise the fault did not strike"
    assert site.error_of(row).startswith(said)
    asked = len(server.calls)
    assert site.look() == []
    assert (len(server.calls) > asked) == (status == 401)
