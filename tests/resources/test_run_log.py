import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune.dataset.models import DatasetProfile
from finetune.errors import ConfigurationError, RemoteError
from finetune.planning.history import Measurement
from finetune.planning.models import Method, TrainingPlan
from finetune.planning.plan import make_plan
from resources.run_log import RunLog

# The user's own statement, by which the table may have been made long before this program came.
BY_HAND = """
CREATE TABLE IF NOT EXISTS lora_training_runs (
    id              BIGSERIAL PRIMARY KEY,
    dataset_paths   TEXT[] NOT NULL,
    base_model      TEXT NOT NULL,
    adapter_path    TEXT,
    backend         TEXT NOT NULL DEFAULT 'hf-peft',    -- 'hf-peft' | 'h2o'
    external_run_id TEXT,                               -- the experiment's id in H2O
    metrics         JSONB NOT NULL DEFAULT '{}'::jsonb, -- loss, accuracy, ...
    status          TEXT NOT NULL,                      -- 'RUNNING', 'COMPLETED', 'FAILED'
    error_message   TEXT,
    started_at      TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    finished_at     TIMESTAMPTZ,
    created_at      TIMESTAMPTZ NOT NULL DEFAULT NOW()
)
"""
COLUMNS = (
    "SELECT column_name, data_type, udt_name, is_nullable, column_default FROM information_schema.columns "
    "WHERE table_name = 'lora_training_runs' ORDER BY ordinal_position"
)
INDEXES = "SELECT indexdef FROM pg_indexes WHERE tablename = 'lora_training_runs'"
FACTS: dict[str, Any] = {
    "run_id": "r1",
    "dataset_paths": [Path("/data/train.jsonl"), "/data/Привіт.jsonl"],
    "base_model": "tiny",
    "backend": "hf-peft",
    "date": "2026-01-01",
}


def sql(url: str, statement: str) -> list[tuple[Any, ...]]:
    import psycopg2

    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []
    finally:
        connection.close()


@pytest.fixture
def log(database: str) -> RunLog:
    return RunLog(database_url=database, data_dir="/nowhere")


def test_a_run_is_running_then_completed_with_its_metrics(log: RunLog) -> None:
    row_id = log.start(**FACTS, dagster_run_id="d1")
    (running,) = log.recent()
    assert (running.id, running.status, running.finished_at) == (row_id, "RUNNING", None)
    assert running.dataset_paths == ["/data/train.jsonl", "/data/Привіт.jsonl"]
    log.complete(row_id, Path("/data/adapters/brain/r1"), {"final_loss": 0.5, "worst": float("nan"), "curve": [1, 2]})
    (done,) = log.recent()
    assert done.status == "COMPLETED"
    assert done.adapter_path == "/data/adapters/brain/r1"
    assert done.metrics == {"final_loss": 0.5, "worst": "nan", "curve": [1, 2]}
    assert done.seconds is not None
    assert done.seconds >= 0


def test_the_table_is_the_users_to_the_letter(log: RunLog, database: str) -> None:
    log.recent()
    made_by_us = sql(database, COLUMNS), sql(database, INDEXES)
    for beside in ("lora_training_run_details", "lora_training_run_measurements"):
        sql(database, f"ALTER TABLE {beside} DROP CONSTRAINT {beside}_id_fkey")
    sql(database, "DROP TABLE lora_training_runs")
    sql(database, BY_HAND)
    assert (sql(database, COLUMNS), sql(database, INDEXES)) == made_by_us
    assert len(made_by_us[0]) == 12


def test_an_existing_populated_table_is_adopted_without_touching_its_rows(log: RunLog, database: str) -> None:
    sql(database, BY_HAND)
    sql(
        database,
        "INSERT INTO lora_training_runs (dataset_paths, base_model, status, metrics) "
        "VALUES ('{/old.jsonl}', 'llama3-8b', 'COMPLETED', '{\"loss\": 1}'), ('{}', 'm', 'RUNNING', '{}')",
    )
    everything = "SELECT *, xmin::text FROM lora_training_runs ORDER BY id"
    before = sql(database, everything)
    row_id = log.start(**FACTS, dagster_run_id="d1")
    assert row_id == 3
    assert sql(database, everything)[:2] == before
    assert [row.id for row in log.close_orphans(lambda run: "gone")] == [3], (
        "rows that others wrote are theirs to close"
    )
    assert sql(database, everything)[:2] == before
    old = log.recent()[-1]
    assert (old.base_model, old.metrics, old.training_run_id) == ("llama3-8b", {"loss": 1}, None)


def test_a_table_with_other_columns_is_refused_by_name_and_left_alone(log: RunLog, database: str) -> None:
    sql(database, "CREATE TABLE lora_training_runs (id BIGSERIAL PRIMARY KEY, metrics TEXT)")
    with pytest.raises(ConfigurationError, match=r"metrics is text instead of jsonb.*DATABASE_URL"):
        log.recent()
    assert sql(database, "SELECT to_regclass('lora_training_run_details')") == [(None,)]
    assert len(sql(database, COLUMNS)) == 2


def test_an_exception_fails_the_row_with_the_error_and_goes_on(log: RunLog) -> None:
    with pytest.raises(RemoteError), log.recording(**FACTS):
        raise RemoteError("the server is busy", where="http://h2o", remedy="Wait")
    (row,) = log.recent()
    assert (row.status, row.error_message) == ("FAILED", "the server is busy [http://h2o]. Wait")
    assert row.finished_at is not None


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, dg.DagsterExecutionInterruptedError, SystemExit])
def test_an_interrupt_fails_the_row_too(log: RunLog, interrupt: type[BaseException]) -> None:
    with pytest.raises(interrupt), log.recording(**FACTS):
        raise interrupt
    assert log.recent()[0].status == "FAILED"
    assert log.recent()[0].error_message == interrupt.__name__


def test_a_block_that_ends_without_a_result_is_failed(log: RunLog) -> None:
    with log.recording(**FACTS):
        pass
    assert log.recent()[0].error_message == "the training step ended without a result"


def test_text_that_postgresql_cannot_hold_is_still_logged(log: RunLog) -> None:
    row_id = log.start(**FACTS)
    log.fail(row_id, "nul \x00 and a lone surrogate \ud800")
    assert log.recent()[0].error_message == r"nul \x00 and a lone surrogate \ud800"


def test_a_retried_step_continues_its_row(log: RunLog) -> None:
    first = log.start(**FACTS, dagster_run_id="d1")
    log.set_external_run(first, "experiment-7", "http://h2o/experiments/7")
    log.fail(first, "the pod was evicted")
    again = log.start(**FACTS, dagster_run_id="d2", dagster_root_run_id="d1")
    assert again == first
    (row,) = log.recent()
    assert (row.status, row.error_message, row.finished_at, row.attempts) == ("RUNNING", None, None, 2)
    assert (row.dagster_run_id, row.external_run_id) == ("d2", "experiment-7")
    assert row.external_run_url == "http://h2o/experiments/7"


def test_a_completed_run_is_history_and_the_next_gets_a_row_of_its_own(log: RunLog) -> None:
    first = log.start(**FACTS, dagster_run_id="d1")
    log.complete(first, "/a", {})
    log.fail(first, "too late")
    second = log.start(**FACTS, dagster_run_id="d1")
    assert second != first
    assert [row.status for row in log.recent()] == ["RUNNING", "COMPLETED"]


def test_another_dagster_run_gets_a_row_of_its_own(log: RunLog) -> None:
    assert log.start(**FACTS, dagster_run_id="d1") != log.start(**FACTS, dagster_run_id="d2")


def test_a_row_whose_process_died_after_the_publication_is_completed_by_the_retry(log: RunLog) -> None:
    killed = log.start(**FACTS, dagster_run_id="d1")
    failed = log.start(**FACTS, dagster_run_id="d2")
    log.fail(failed, "the run log's database does not answer")
    others = log.start(**FACTS, dagster_run_id="d3")
    log.fail(others, "no GPU")
    settled = log.settle(run_id="r1", dagster_root_run_id="d2", adapter_path="/a", metrics={"final_loss": 1})
    assert settled == [killed, failed]
    by_id = {row.id: row for row in log.recent()}
    assert by_id[failed].status == by_id[killed].status == "COMPLETED"
    assert (by_id[failed].error_message, by_id[failed].adapter_path) == (None, "/a")
    assert by_id[others].error_message == "no GPU"
    assert log.settle(run_id="r1", dagster_root_run_id="d2", adapter_path="/a", metrics={}) == []


def test_a_remote_run_is_called_so(log: RunLog) -> None:
    log.start(**{**FACTS, "backend": "h2o"})
    assert log.recent()[0].backend_label == "Remote Training (H2O)"


def test_recent_runs_come_newest_first_and_by_status(log: RunLog) -> None:
    ids = [log.start(**{**FACTS, "run_id": f"r{number}"}) for number in range(3)]
    log.fail(ids[1], "no")
    assert [row.id for row in log.recent()] == ids[::-1]
    assert [row.id for row in log.recent(1)] == ids[-1:]
    assert [row.id for row in log.recent(status="FAILED")] == [ids[1]]


WRITER = """
import sys
from resources.run_log import RunLog
log = RunLog(database_url=sys.argv[1], data_dir=sys.argv[2])
row = log.start(run_id=sys.argv[3], dataset_paths=["/x"], base_model="m", backend="hf-peft", dagster_run_id="killed")
print(row, flush=True)
sys.stdin.readline()
log.complete(row, "/adapter", {"loss": 1})
log.close()
"""


def writer(url: str, data_dir: Path | str, run_id: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, str(data_dir), run_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_killed_process_leaves_a_running_row_that_is_closed_when_its_dagster_run_is_over(
    log: RunLog, database: str
) -> None:
    process = writer(database, "/nowhere", "doomed")
    row_id = int(first_line(process))
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    alive = log.start(**FACTS, dagster_run_id="alive")
    assert {row.status for row in log.recent()} == {"RUNNING"}
    reasons = {"killed": "Dagster run killed ended as FAILURE"}
    assert [row.id for row in log.close_orphans(reasons.get)] == [row_id]
    by_id = {row.id: row for row in log.recent()}
    assert (by_id[row_id].status, by_id[row_id].error_message) == ("FAILED", "Dagster run killed ended as FAILURE")
    assert by_id[alive].status == "RUNNING"
    assert log.close_orphans(reasons.get) == []


def test_a_row_that_a_retry_took_over_meanwhile_is_not_closed(log: RunLog) -> None:
    row_id = log.start(**FACTS, dagster_run_id="d1")

    def over_and_retried(run_id: str) -> str:
        log.start(**FACTS, dagster_run_id="d2", dagster_root_run_id="d1")
        return f"{run_id} is over"

    assert log.close_orphans(over_and_retried) == []
    (row,) = log.recent()
    assert (row.id, row.status, row.attempts) == (row_id, "RUNNING", 2)


def test_processes_that_start_together_on_an_empty_data_root_share_one_log(short_directory: Path) -> None:
    processes = [writer("", short_directory, f"r{number}") for number in range(3)]
    assert sorted(int(first_line(process)) for process in processes) == [1, 2, 3]
    for process in processes:
        process.communicate("\n")
        assert process.returncode == 0
    log = RunLog(data_dir=str(short_directory))
    assert [row.status for row in log.recent()] == ["COMPLETED"] * 3
    log.close()


def test_two_processes_of_one_chain_at_once_write_one_row(log: RunLog, database: str) -> None:
    processes = [writer(database, "/nowhere", "same") for _ in range(2)]
    assert {first_line(process) for process in processes} == {"1\n"}
    for process in processes:
        process.communicate("\n")
    assert [row.attempts for row in log.recent()] == [2]


def test_the_embedded_server_is_started_again_under_an_open_log(data_root: Path) -> None:
    log = RunLog(data_dir=str(data_root))
    row_id = log.start(**FACTS)
    pid = int((data_root / "postgres" / "cluster" / "postmaster.pid").read_text().splitlines()[0])
    os.kill(pid, signal.SIGKILL)
    log.complete(row_id, "/adapter", {})
    assert log.recent()[0].status == "COMPLETED"
    assert int((data_root / "postgres" / "cluster" / "postmaster.pid").read_text().splitlines()[0]) != pid
    log.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgres://user:geh%40im@127.0.0.1:1/runs", "DATABASE_URL=postgresql://user:***@127.0.0.1:1/runs"),
        ("postgresql://user@127.0.0.1:1/runs?password=geh", "DATABASE_URL=postgresql://user@127.0.0.1:1/runs]"),
    ],
)
def test_a_server_that_does_not_answer_is_a_remote_error_without_the_password(url: str, shown: str) -> None:
    log = RunLog(database_url=url, data_dir="/nowhere")
    with pytest.raises(RemoteError, match=re.escape(shown)) as caught:
        log.recent()
    assert "geh" not in repr(log)
    error: BaseException | None = caught.value
    while error is not None:
        assert "geh" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.mark.parametrize("url", ["sqlite:///runs.db", "not a url with s3cret", "mysql://u:s3cret@h/d"])
def test_a_database_url_of_another_kind_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigurationError, match="DATABASE_URL") as caught:
        RunLog(database_url=url, data_dir="/nowhere").recent()
    assert "s3cret" not in str(caught.value)


def test_a_log_that_cannot_be_told_does_not_hide_the_training_s_own_error(log: RunLog, database: str) -> None:
    log.recent()
    sql(database, "ALTER TABLE lora_training_runs RENAME COLUMN error_message TO gone")
    with pytest.raises(ValueError, match="the loss is NaN") as caught, log.recording(**FACTS):
        raise ValueError("the loss is NaN")
    assert "The run log could not be told" in caught.value.__notes__[0]


def test_it_serves_as_a_dagster_resource_and_lets_go_at_the_end(data_root: Path) -> None:
    @dg.asset
    def trained(context: dg.AssetExecutionContext, run_log: RunLog) -> None:
        with run_log.recording(**FACTS, dagster_run_id=context.run.run_id) as recording:
            recording.complete("/adapter", {"loss": 1.0})

    result = dg.materialize([trained], resources={"run_log": RunLog(data_dir=str(data_root))})
    assert result.success
    assert not (data_root / "postgres" / "cluster" / "postmaster.pid").exists(), "the server was left running"
    log = RunLog(data_dir=str(data_root))
    assert [(row.status, row.dagster_run_id) for row in log.recent()] == [("COMPLETED", result.run_id)]
    log.close()


def test_what_trainings_took_is_told_for_the_model_and_the_kind_of_device_newest_first(log: RunLog) -> None:
    def train(run_id: str, device: str, peak: float, base_model: str = "tiny", complete: bool = True) -> None:
        row_id = log.start(**{**FACTS, "run_id": run_id, "base_model": base_model})
        log.measured(
            row_id,
            Measurement(
                method="lora", device=device, estimated_memory_gb=2.0, peak_memory_gb=peak, tokens_per_second=100.0
            ),
        )
        if complete:
            log.complete(row_id, "/a", {})

    train("r1", "NVIDIA L4", 1.0)
    train("r2", "NVIDIA L4", 3.0)
    train("r3", "cpu", 9.0)
    train("r4", "NVIDIA L4", 9.0, base_model="other")
    train("r5", "NVIDIA L4", 9.0, complete=False)

    measured = log.measurements("tiny", "cuda")

    assert [run.peak_memory_gb for run in measured] == [3.0, 1.0]
    assert measured[0].tokens_per_second == 100.0
    assert [run.peak_memory_gb for run in log.measurements("tiny", "cpu")] == [9.0]
    assert [run.peak_memory_gb for run in log.measurements("tiny", "cuda", limit=1)] == [3.0]


def test_what_trainings_took_corrects_the_next_plan_of_the_same_model_and_method(log: RunLog, tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "benchmarks" / "memory" / "models" / "tiny-llama-1.1b"
    profile = DatasetProfile(
        total_samples=1000,
        format_detected="jsonl",
        has_instruction=True,
        has_output=True,
        avg_tokens=200,
        max_tokens=500,
        columns=[],
        duplicates_found=0,
        total_tokens=200_000,
    )

    def plan(method: Method) -> TrainingPlan:
        history = log.measurements("tiny", "cuda")
        return make_plan(model, profile, method=method, device="cuda", vram_limit_gb=80, history=history)

    before = plan("lora")
    took = before.memory_estimate.vram_gb * 1.2
    for run_id, peak in enumerate([took, took, 50 * took]):
        with log.recording(**{**FACTS, "run_id": f"r{run_id}"}) as row:
            row.measured(
                Measurement(
                    method="lora",
                    device="NVIDIA L4",
                    estimated_memory_gb=before.memory_estimate.vram_gb,
                    peak_memory_gb=peak,
                    tokens_per_second=5000,
                )
            )
            row.complete("/a", {})

    after = plan("lora")

    assert after.memory_estimate.vram_gb == pytest.approx(took, rel=1e-5), "one odd run decides nothing"
    assert after.memory_estimate.correction == pytest.approx(1.2)
    assert sum(after.memory_estimate.parts.values()) == pytest.approx(took, rel=1e-5)
    assert any("last 3 trainings by lora" in line for line in after.explanations)
    assert after.cost is not None
    assert after.cost.throughput == "measured, median of 3"
    assert after.cost.gpu_hours == pytest.approx(600_000 / 5000 / 3600)
    assert plan("qlora").memory_estimate.correction == 1.0
