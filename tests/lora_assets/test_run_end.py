"""What people and monitoring are told of runs that have ended: real runs of a real instance, real HTTP."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import EngineEventData
from typer.testing import CliRunner

from finetune.errors import DatasetError, PermanentError, RemoteError, TransientError
from lora_assets.run_end import alerts_of, fail_dead_runs, report_end, tell_not_begun
from lora_assets.settings import Settings, load_settings
from resources.retries import RETRY_POLICY, no_retry_if_permanent
from tests.resources.webhook_server import WebhookServer

DATE = "2026-06-01"
PARTITION = {"dagster/partition": DATE}
PASSWORD = "db-pass-8s7"


@pytest.fixture
def webhook() -> Iterator[WebhookServer]:
    server = WebhookServer()
    yield server
    server.close()


@pytest.fixture
def settings(webhook: WebhookServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "DATA_ROOT": str(tmp_path / "data"),
        "ALERT_WEBHOOK_URL": webhook.url,
        "DAGSTER_UI_URL": "http://dagster.internal",
        "DATABASE_URL": f"postgresql://brain:{PASSWORD}@127.0.0.1:1/runs",
        "H2O_API_KEY": "h2o-key-5k2",
        "HF_TOKEN": "hub-token-4w1",
    }.items():
        monkeypatch.setenv(name, value)
    return load_settings()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as found:
        yield found


def run_that_raises(error: Exception, instance: dg.DagsterInstance, **tags: str) -> dg.DagsterRun:
    @dg.op
    def adapter() -> None:
        with no_retry_if_permanent():
            raise error

    @dg.job
    def train() -> None:
        adapter()

    result = train.execute_in_process(instance=instance, raise_on_error=False, tags={**PARTITION, **tags})
    return result.dagster_run


def test_a_failed_run_is_told_of_with_all_that_a_person_needs_and_without_secrets(
    settings: Settings, webhook: WebhookServer, instance: dg.DagsterInstance
) -> None:
    reason = f"refused postgresql://brain:{PASSWORD}@h/runs for h2o-key-5k2 and hub-token-4w1, {webhook.url}"
    run = run_that_raises(DatasetError(reason, where="/data/x", remedy="Correct the line"), instance)
    report_end(settings, instance, run)
    [text] = webhook.texts
    for told in (
        "train failed",
        f"Date: {DATE}",
        "Step: adapter",
        f"Run: http://dagster.internal/runs/{run.run_id}",
        "[/data/x]. Correct the line",
        "Trying again does not help",
        f"lora-assets run --date {DATE}",
    ):
        assert told in text
    for secret in (PASSWORD, "h2o-key-5k2", "hub-token-4w1", "hush-hush"):
        assert secret in reason
        assert secret not in text


def test_of_a_passing_error_people_are_told_that_it_was_tried_again(instance: dg.DagsterInstance) -> None:
    [alert] = alerts_of(instance, run_that_raises(RemoteError("no answer"), instance))
    assert alert.reason == "no answer"
    assert alert.remedy.startswith("It was tried again and failed each time")


def test_a_run_that_dagster_tries_again_is_not_told_of(instance: dg.DagsterInstance) -> None:
    run = run_that_raises(RemoteError("no answer"), instance)
    instance.add_run_tags(run.run_id, {"dagster/will_retry": "true"})
    again = instance.get_run_by_id(run.run_id)
    assert again is not None
    assert alerts_of(instance, again) == []


def test_a_run_whose_process_died_without_a_word_is_told_of(instance: dg.DagsterInstance) -> None:
    run = instance.create_run_for_job(dg.GraphDefinition(name="train").to_job(), tags=PARTITION)
    instance.report_run_failed(run, "the pod was evicted")
    ended = instance.get_run_by_id(run.run_id)
    assert ended is not None
    [alert] = alerts_of(instance, ended)
    assert (alert.title, alert.reason, alert.date) == ("train failed", "the pod was evicted", DATE)


@dg.asset
def model() -> None:
    """Something that is checked."""


@dg.asset(deps=[model])
def served() -> None:
    """What a blocking check keeps from being made."""


def materialize(
    instance: dg.DagsterInstance, name: str, severity: dg.AssetCheckSeverity, *, blocking: bool, passed: bool = False
) -> dg.DagsterRun:
    @dg.asset_check(asset=model, name=name, blocking=blocking)
    def check() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=passed, severity=severity, description="12 of 40 lines rejected")

    defs = dg.Definitions(assets=[model, served], asset_checks=[check], jobs=[dg.define_asset_job("make")])
    result = defs.resolve_job_def("make").execute_in_process(instance=instance, raise_on_error=False, tags=PARTITION)
    return result.dagster_run


def test_a_failed_blocking_check_is_told_of_once_by_its_own_description(instance: dg.DagsterInstance) -> None:
    run = materialize(instance, "whole", dg.AssetCheckSeverity.ERROR, blocking=True)
    assert run.status == dg.DagsterRunStatus.FAILURE, "otherwise it did not block"
    [alert] = alerts_of(instance, run)
    assert (alert.title, alert.step) == ("Check whole failed", "model")
    assert alert.reason == "12 of 40 lines rejected"
    assert alert.remedy.startswith("Nothing was made from it")


@pytest.mark.parametrize(
    ("name", "severity", "passed", "told"),
    [
        ("whole", dg.AssetCheckSeverity.ERROR, False, True),
        ("whole", dg.AssetCheckSeverity.ERROR, True, False),
        ("champion_drift", dg.AssetCheckSeverity.WARN, False, True),
        ("champion_drift", dg.AssetCheckSeverity.WARN, True, False),
        ("adapter_beats_base", dg.AssetCheckSeverity.WARN, False, False),
    ],
)
def test_of_checks_in_successful_runs_errors_and_drift_are_told_of(
    instance: dg.DagsterInstance, name: str, severity: dg.AssetCheckSeverity, passed: bool, told: bool
) -> None:
    run = materialize(instance, name, severity, blocking=False, passed=passed)
    assert run.status == dg.DagsterRunStatus.SUCCESS
    assert len(alerts_of(instance, run)) == told


def test_nothing_that_goes_wrong_while_telling_reaches_the_run(
    settings: Settings, webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run = run_that_raises(RemoteError("no answer"), instance)

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("storage away")

        monkeypatch.setattr(instance, "all_logs", broken)
        with caplog.at_level(logging.ERROR):
            report_end(settings, instance, run)
    assert "could not be reported" in caplog.text
    assert webhook.texts == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run"], 1),
        (["backfill", "--from", "2026-06-01", "--to", "2026-06-02"], 1),
        (["run", "--dry-run"], 0),
    ],
)
def test_a_command_that_cannot_begin_is_told_of(
    settings: Settings, webhook: WebhookServer, arguments: list[str], told: int
) -> None:
    from lora_assets.cli.app import app

    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert len(webhook.texts) == told
    for text in webhook.texts:
        assert "lora-assets run could not begin" in text
        assert str(settings.exports) in text


def test_that_another_command_is_at_work_is_no_trouble(settings: Settings, webhook: WebhookServer) -> None:
    tell_not_begun(TransientError("another lora-assets run is at work"))
    assert webhook.texts == []
    tell_not_begun(RemoteError("the database does not answer"))
    [text] = webhook.texts
    assert "The next one tries again" in text


def every(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(each for sub in kind.__subclasses__() for each in every(sub))]


# As the assets' own, a thousand times as fast.
FAST = RETRY_POLICY._replace(delay=(RETRY_POLICY.delay or 0) / 1000)


@pytest.mark.parametrize(
    ("kind", "pauses"),
    [
        *((kind, []) for kind in every(PermanentError)),
        *((kind, [10, 30]) for kind in every(TransientError)),
        (OSError, [10, 30]),
        (ValueError, [10, 30]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_which_errors_are_tried_again_and_after_what_pauses(
    instance: dg.DagsterInstance, kind: type[Exception], pauses: list[int]
) -> None:
    tried: list[int] = []

    @dg.op(retry_policy=FAST)
    def adapter() -> None:
        tried.append(1)
        with no_retry_if_permanent():
            raise kind("out of luck")

    @dg.job
    def train() -> None:
        adapter()

    result = train.execute_in_process(instance=instance, raise_on_error=False)
    assert not result.success
    assert len(tried) == 1 + len(pauses)
    waits = [event.step_retry_data.seconds_to_wait for event in result.all_events if event.is_step_up_for_retry]
    assert [round(1000 * wait) for wait in waits] == pauses


def test_every_asset_of_a_date_is_tried_again() -> None:
    from lora_assets.definitions import defs

    for asset in defs.assets or []:
        if isinstance(asset, dg.AssetsDefinition) and asset.partitions_def is not None:
            for op in asset.node_def.iterate_op_defs():
                assert op.retry_policy == RETRY_POLICY, (asset.keys, op.name)


STARTED = "Started process for run (pid: {}).".format


def started_run(instance: dg.DagsterInstance, pid: int, **tags: str) -> str:
    run = instance.create_run_for_job(dg.GraphDefinition(name="train").to_job(), tags=tags)
    instance.report_engine_event(STARTED(pid), run, EngineEventData.in_process(pid))
    instance.report_dagster_event(
        dg.DagsterEvent(event_type_value=dg.DagsterEventType.RUN_START.value, job_name="train"), run.run_id
    )
    return run.run_id


def test_a_run_whose_process_was_killed_along_with_the_daemon_is_failed(tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        killed, alive = started_run(instance, process.pid), started_run(instance, os.getpid())
        of_a_command = started_run(instance, process.pid, **{"lora-assets/entry": "run"})
        assert fail_dead_runs(instance) == [], "its process lives"
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert fail_dead_runs(instance) == [killed], "one that is not yet waited for is dead too"
        assert process.wait() == -signal.SIGKILL
        assert fail_dead_runs(instance) == []
        statuses = {run.run_id: run.status.value for run in instance.get_runs()}
        assert statuses == {killed: "FAILURE", alive: "STARTED", of_a_command: "STARTED"}


def test_a_number_that_another_process_was_given_since_is_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        run = started_run(instance, os.getpid())
        monkeypatch.setattr("lora_assets.run_end._began", lambda pid: time.time() + 60)
        assert fail_dead_runs(instance) == [run]
