"""Everything is killed, and what is left is closed: a real run of a real daemon, a real row, a real lease."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psycopg2
import pytest

from lora_assets.definitions import close_what_was_killed
from lora_assets.settings import load_settings
from resources.postgres import EmbeddedPostgres
from resources.run_log import RunLog
from sensors.run_failure import build_reconciliation_sensor
from tests.e2e.conftest import data_root
from tests.resources.webhook_server import WebhookServer

DATE = "2026-06-01"
JOB = f"""
import time, os
import dagster as dg
from resources.run_log import RunLog

@dg.op
def adapter(context) -> None:
    log = RunLog(database_url=os.environ["TEST_DATABASE"], data_dir="/nowhere")
    facts = dict(run_id="r1", dataset_paths=["a.jsonl"], base_model="tiny", backend="hf-peft", date="{DATE}")
    with log.lease("r1", seconds=2), log.recording(**facts, dagster_run_id=context.run_id):
        time.sleep(600)

@dg.job
def train():
    adapter()

@dg.sensor(job=train, minimum_interval_seconds=1, default_status=dg.DefaultSensorStatus.RUNNING)
def arrival(context):
    return dg.RunRequest(run_key="once", tags={{"dagster/partition": "{DATE}"}})

defs = dg.Definitions(jobs=[train], sensors=[arrival])
"""


@pytest.fixture
def root() -> Iterator[Path]:
    with data_root() as path:
        path.mkdir(parents=True)
        yield path


@pytest.mark.e2e
def test_after_the_daemon_the_code_server_and_the_run_were_killed_the_run_and_its_row_are_closed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, webhook = EmbeddedPostgres(root / "postgres"), WebhookServer()
    home = root / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    (root / "definitions.py").write_text(JOB)
    monkeypatch.chdir(root)
    for name, value in {
        "DATA_ROOT": str(root),
        "DATABASE_URL": server.url,
        "DAGSTER_HOME": str(home),
        "ALERT_WEBHOOK_URL": webhook.url,
    }.items():
        monkeypatch.setenv(name, value)
    log = RunLog(database_url=server.url, data_dir=str(root))
    with (root / "dev.log").open("w") as output:
        dev = subprocess.Popen(
            [Path(sys.executable).with_name("dagster"), "dev", "-f", "definitions.py", "-p", "0"],
            env={**os.environ, "TEST_DATABASE": server.url, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 180
        while not log.recent():
            said = (root / "dev.log").read_text()[-3000:]
            assert dev.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.3)
        [row] = log.recent()
        with dg.DagsterInstance.get() as instance:
            close = build_reconciliation_sensor(lambda here: close_what_was_killed(load_settings(), here))
            tick = dg.build_sensor_context(instance=instance)
            assert "nothing was left behind" in str(close(tick)), "the run lives, and is left alone"
            assert log.live_trainings() == {"r1"}

            os.killpg(dev.pid, signal.SIGKILL)
            assert dev.wait() == -signal.SIGKILL
            killed = [f"closed run {row.dagster_run_id}", f"closed row {row.id}"]
            run = instance.get_run_by_id(row.dagster_run_id or "")
            assert run is not None
            assert run.status == dg.DagsterRunStatus.STARTED, "otherwise somebody had noticed"
            assert [each.status for each in log.recent()] == ["RUNNING"]

            # The group was told to end at once, but the kernel ends one process after the other.
            end = time.monotonic() + 60
            while "nothing was left behind" in (said := str(close(tick))):
                assert time.monotonic() < end
                time.sleep(0.05)
            assert ", ".join(killed) in said
            assert "nothing was left behind" in str(close(tick))
            ended = instance.get_run_by_id(run.run_id)
            assert ended is not None
            assert ended.status == dg.DagsterRunStatus.FAILURE
        [closed] = log.recent()
        assert closed.status == "FAILED"
        assert closed.error_message == "its Dagster run ended as FAILURE"
        [text] = webhook.texts
        assert f"Date: {DATE}" in text
        assert str(row.dagster_run_id) in text
    finally:
        if dev.poll() is None:
            os.killpg(dev.pid, signal.SIGKILL)
            dev.wait()
        log.close()
        server.close()
        webhook.close()


def test_a_row_whose_lease_nobody_renews_is_closed_whatever_dagster_knows_of_its_run(root: Path) -> None:
    server = EmbeddedPostgres(root / "postgres")
    log = RunLog(database_url=server.url, data_dir=str(root))
    try:
        rows = {}
        for run_id in ("dead", "alive", "paused"):
            with log.lease(run_id):
                facts = {"dataset_paths": ["a"], "base_model": "tiny", "backend": "hf-peft", "date": DATE}
                rows[run_id] = log.start(run_id=run_id, dagster_run_id=f"unknown-{run_id}", **facts)  # type: ignore[arg-type]
        with psycopg2.connect(server.url) as connection, connection.cursor() as cursor:
            for run_id, seconds in {"dead": -61, "alive": 20, "paused": -5}.items():
                cursor.execute(
                    "UPDATE lora_training_leases SET expires_at = clock_timestamp() + make_interval(secs => %s) "
                    "WHERE training_run_id = %s",
                    (seconds, run_id),
                )
        connection.close()
        [closed] = log.close_abandoned()
        assert (closed.id, closed.status) == (rows["dead"], "FAILED")
        assert "was killed" in (closed.error_message or "")
        assert log.close_abandoned() == []
        assert {row.training_run_id: row.status for row in log.recent()} == {
            "dead": "FAILED",
            "alive": "RUNNING",
            "paused": "RUNNING",
        }
        again = log.start(run_id="dead", dagster_run_id="unknown-dead", **facts)  # type: ignore[arg-type]
        assert again == rows["dead"], "whoever tries again within the same run takes its row up"
    finally:
        log.close()
        server.close()
