"""A run whose process is killed in the middle of training leaves nothing that stands in the next one's way."""

import fcntl
import os
import shutil
import signal
import subprocess
import time

import pytest

from lora_assets.cli.demo import EXAMPLES
from tests.e2e.conftest import DATES, PROGRAM, Loop
from tests.e2e.test_bad_input import assert_nothing_half_made, assert_plain, run_statuses

pytestmark = pytest.mark.e2e


@pytest.fixture
def exports(loop: Loop) -> Loop:
    loop.layout.exports.mkdir(parents=True)
    for file in EXAMPLES.glob(f"*{DATES[0]}*"):
        shutil.copy(file, loop.layout.exports)
    # What else is exported, and how much is learned, does not matter here.
    loop.environment |= {"TRAIN_EPOCHS": "2", "EXPORT_TARGETS": "vllm"}
    return loop


def test_a_run_killed_while_it_trains_is_closed_and_the_next_one_succeeds(exports: Loop) -> None:
    log = exports.root / "run.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [PROGRAM, "run"], env=exports.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + 300
    while "training: " not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "otherwise the fault did not strike"
    assert run_statuses(exports) == ["STARTED"]
    assert [row["status"] for row in exports.run_json("runs")] == ["RUNNING"]
    assert not (exports.root / "adapters").exists()

    again = exports.run("run")
    assert again.returncode == 0, again.stdout + again.stderr
    assert run_statuses(exports) == ["FAILURE", "SUCCESS"]
    newest, killed = exports.run_json("runs")
    assert newest["status"] == "COMPLETED"
    assert (killed["status"], killed["error_message"]) == ("FAILED", "its process was killed")
    assert_nothing_half_made(exports)


def test_two_runs_at_once_on_one_data_root_do_not_mix(exports: Loop) -> None:
    home = exports.root / "dagster"
    home.mkdir()
    with (home / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_plain(exports.run("run"), "another lora-assets run is at work", code=75)
    assert not (home / "history" / "runs.db").exists()
