"""Of all processes that could train the same, one may: real processes, a real PostgreSQL."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from finetune.adapter_files import adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.dataset.models import Counts, PreparedDataset
from finetune.errors import RemoteError, TransientError
from finetune.planning.models import MemoryEstimate, TrainingPlan, TrialConfig
from finetune.progress import ProgressEvent
from finetune.training.models import TrainingRequest
from finetune.training.sft import train_adapter
from resources.lease import Lease
from resources.run_log import RunLog

HOLD = """
import sys
from finetune.errors import TransientError
from resources.run_log import RunLog
log = RunLog(database_url=sys.argv[1], data_dir="/nowhere")
log.recent()
print("ready", flush=True)
sys.stdin.readline()
try:
    with log.lease("r1", seconds=float(sys.argv[2])) as lease:
        print("held", lease.token, flush=True)
        sys.stdin.readline()
        print("mine", lease.still_mine(), flush=True)
except TransientError as error:
    print("refused", error, flush=True)
"""

TRAIN = """
import sys
from finetune.errors import TransientError
from finetune.training.models import TrainingRequest
from finetune.training.sft import train_adapter
from resources.run_log import RunLog
log = RunLog(database_url=sys.argv[1], data_dir="/nowhere")
request = TrainingRequest.model_validate_json(sys.argv[3])
try:
    with log.lease("r1", seconds=float(sys.argv[2])) as lease:
        train_adapter(request, still_mine=lease.still_mine)
except TransientError as error:
    print(error)
    sys.exit(75)
"""


@pytest.fixture
def log(database: str) -> RunLog:
    return RunLog(database_url=database, data_dir="/nowhere")


@contextmanager
def running(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is killed at the end, however the test ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def lease_row(url: str) -> tuple[int, bool]:
    """The token, and whether the lease holds now."""
    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT token, expires_at > clock_timestamp() FROM lora_training_leases")
            token, holds = cursor.fetchone() or (0, False)
            return int(token), bool(holds)
    finally:
        connection.close()


def test_a_lease_is_held_for_the_block_and_free_after_it_and_its_token_grows(log: RunLog, database: str) -> None:
    with log.lease("r1", seconds=600) as first:
        assert first.still_mine()
        assert lease_row(database) == (1, True)
    assert lease_row(database) == (1, False)
    with log.lease("r1", seconds=600) as second:
        assert (first.token, second.token) == (1, 2)
        assert second.still_mine()
        assert not first.still_mine()


def test_of_two_processes_that_start_at_once_one_trains_and_the_other_says_who_does(database: str) -> None:
    with running(HOLD, database, "1") as one, running(HOLD, database, "1") as other:
        assert [line_of(one), line_of(other)] == ["ready", "ready"]
        go_on(one)
        go_on(other)
        lines: dict[int, str] = {}
        threads = [
            threading.Thread(target=lambda process=process: lines.update({process.pid: line_of(process)}))
            for process in (one, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [pid for pid, line in lines.items() if line.startswith("held")]
        (loser,) = [pid for pid, line in lines.items() if line.startswith("refused")]
        assert f"process {winner} on " in lines[loser]
        assert "trains this already" in lines[loser]
        # It outlived the loser's whole patience by renewing its lease.
        holder = one if one.pid == winner else other
        go_on(holder)
        assert line_of(holder) == "mine True"


def test_who_waits_gets_the_lease_when_its_holder_ends_and_tells_for_whom_it_waited(log: RunLog) -> None:
    events: list[ProgressEvent] = []
    begun = threading.Event()
    taken = threading.Event()

    def wait(event: ProgressEvent) -> None:
        events.append(event)
        begun.set()

    def take() -> None:
        with log.lease("r1", seconds=600, on_progress=wait):
            taken.set()

    waiter = threading.Thread(target=take)
    with log.lease("r1", seconds=600):
        waiter.start()
        assert begun.wait(60)
        assert not taken.is_set()
    waiter.join(60)
    assert taken.is_set()
    assert [str(event) for event in events] == [f"waiting for {events[0].stage.removeprefix('waiting for ')} ..."]
    assert f"process {os.getpid()} on" in events[0].stage


def test_a_holder_that_was_killed_on_this_machine_is_not_waited_for(log: RunLog, database: str) -> None:
    with running(HOLD, database, "3600") as process:
        line_of(process)
        go_on(process)
        assert line_of(process) == "held 1"
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert lease_row(database) == (1, True), "otherwise the lease ended by itself"
        # Dead, but its parent has not asked yet how it ended.
        with log.lease("r1", seconds=3600) as lease:
            assert lease.token == 2


def test_a_database_that_is_away_is_borne_as_long_as_the_lease_surely_holds(log: RunLog) -> None:
    away = False

    def transaction() -> AbstractContextManager[Any]:
        if away:
            raise RemoteError("the run log's database does not answer")
        return log.transaction()

    with log.lease("r1", seconds=600) as held:
        lease = Lease(transaction, "r1", held.token, 600)
        assert lease.still_mine()
        away = True
        assert lease.still_mine()
        lease._safe_until = time.monotonic()
        with pytest.raises(RemoteError):
            lease.still_mine()


def request_for(tmp_path: Path, base_model: BaseModelRef) -> TrainingRequest:
    """A training of six steps with a checkpoint after each."""
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    lines = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(24)]
    (prepared / "train.jsonl").write_text("".join(lines))
    counts = Counts(lines=24, train=24, eval=0, duplicates=0, rejected=0, blank=0)
    return TrainingRequest(
        run_id="r1",
        date="2026-06-01",
        dataset=PreparedDataset(
            path=prepared,
            date="2026-06-01",
            fingerprint="f",
            window_dates=["2026-06-01"],
            counts=counts,
            rejects_by_reason={},
            rejects_by_file={},
        ),
        plan=TrainingPlan(
            trial_config=TrialConfig(
                trial_id="t", lora_rank=4, micro_batch=1, accumulation=2, max_steps=6, max_length=64
            ),
            search_space={},
            memory_estimate=MemoryEstimate(
                vram_gb=0, fits=None, limit_gb=None, model_params=0, trainable_params=0, parts={}
            ),
            explanations=[],
            estimated_steps=0,
            estimated_tokens=None,
        ),
        base_model=base_model,
        adapter_dir=tmp_path / "adapter",
        work_dir=tmp_path / "work",
        checkpoint_seconds=0.0,
    )


def test_a_training_paused_beyond_its_lease_stops_before_it_writes_and_the_other_one_s_adapter_stays(
    log: RunLog, database: str, tmp_path: Path, tiny_model: BaseModelRef
) -> None:
    request = request_for(tmp_path, tiny_model)
    checkpoints = request.work_dir / "checkpoints"
    seconds = 2.0
    with running(TRAIN, database, str(seconds), request.model_dump_json()) as paused:
        # While the other one imports them too.
        import trl.trainer.sft_trainer  # noqa: F401

        while not (checkpoints / "checkpoint-3" / "complete.json").exists():
            assert paused.poll() is None
            time.sleep(0.002)
        paused.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, paused.pid, os.WSTOPPED | os.WNOWAIT)
        assert lease_row(database)[0] == 1
        waited: list[str] = []
        with log.lease("r1", seconds=seconds, on_progress=lambda event: waited.append(event.stage)) as lease:
            assert f"process {paused.pid} on" in waited[0], "otherwise the lease was not in the way"
            assert lease.token == 2
            result = train_adapter(request, still_mine=lease.still_mine)
        assert 3 <= result.resumed_from_step < result.training_steps == 6
        manifest = (request.adapter_dir / "manifest.json").read_bytes()
        assert not checkpoints.exists()

        paused.send_signal(signal.SIGCONT)
        output, _ = paused.communicate(timeout=300)
        assert paused.returncode == 75, output
        assert "another process has taken this training over" in output
        assert not list(checkpoints.rglob("complete.json")), "it wrote a checkpoint"
        assert (request.adapter_dir / "manifest.json").read_bytes() == manifest, "it published"
        assert adapter_hash(request.adapter_dir) == result.adapter_hash


def test_an_adapter_is_not_published_by_whom_the_lease_was_taken_from(tmp_path: Path, tiny_model: BaseModelRef) -> None:
    request = request_for(tmp_path, tiny_model).model_copy(update={"checkpoint_seconds": 3600.0})
    asked: list[bool] = []

    def lost() -> bool:
        asked.append((request.work_dir / "checkpoints").exists() and any(request.work_dir.rglob("checkpoint-*")))
        return False

    with pytest.raises(TransientError, match="has taken this training over"):
        train_adapter(request, still_mine=lost)
    assert asked == [False]
    assert not request.adapter_dir.exists()
    assert not list(tmp_path.glob(".adapter.tmp-*"))


def test_a_failure_of_a_process_whose_row_a_retry_has_taken_leaves_the_row_running(log: RunLog, database: str) -> None:
    facts: dict[str, Any] = {"run_id": "r1", "dataset_paths": ["/x"], "base_model": "m", "backend": "hf-peft"}
    row = log.start(**facts, dagster_run_id="d1")
    connection = psycopg2.connect(database)
    with connection, connection.cursor() as cursor:
        cursor.execute("UPDATE lora_training_run_details SET host = 'elsewhere'")
    connection.close()
    log.fail(row, "the lease was lost")
    assert [found.status for found in log.recent()] == ["RUNNING"]
