"""Secrets of runs that fail, and what Dagster shows of the code; a run that succeeds is in tests/e2e."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from lora_assets.cli.demo import EXAMPLES
from lora_assets.settings import Settings, is_secret
from tests.e2e.conftest import Loop

# A value for each variable that holds a secret: a new one without a value here fails the first test.
SENTINELS = {
    "HF_TOKEN": "hf_31f8-sentinel",
    "H2O_API_KEY": "5c0d-sentinel",
    "DATABASE_URL": "postgresql://me:8e7b-sentinel@127.0.0.1:1/db?connect_timeout=1",
    "SAMPLES_DATABASE_URL": "postgresql://me:27aa-sentinel@127.0.0.1:1/db?connect_timeout=1",
    "ALERT_WEBHOOK_URL": "http://127.0.0.1:1/services/d913-sentinel",
}
H2O = {
    "TRAINING_BACKEND": "h2o",
    "H2O_API_URL": "http://127.0.0.1:1",
    "H2O_TIMING": '{"connect_timeout": 1, "retry_budget": 0}',
}
MARK = "-sentinel"


@pytest.fixture
def secretive(loop: Loop) -> Loop:
    loop.layout.exports.mkdir(parents=True)
    for file in EXAMPLES.glob("*2026-06-01*"):
        shutil.copy(file, loop.layout.exports)
    loop.environment |= SENTINELS
    return loop


def written(loop: Loop) -> list[str]:
    """The files below the data root's parent that hold a sentinel."""
    files = [path for path in loop.root.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    return [str(path) for path in files if MARK.encode() in path.read_bytes()]


def test_every_secret_has_a_sentinel() -> None:
    assert {name.upper() for name, field in Settings.model_fields.items() if is_secret(field)} == set(SENTINELS)


def test_a_database_that_does_not_answer_is_told_without_its_password(secretive: Loop) -> None:
    done = secretive.run("run")
    assert done.returncode == 75, done.stderr
    assert MARK not in done.stdout + done.stderr
    assert written(secretive) == []


# The step's failure, its traceback and its retries land in events and in the output of steps.
FAILING = """
import dagster as dg
from lora_assets.assets import training
from lora_assets.definitions import defs
training.training_plan.op._retry_policy = None  # minutes between attempts
from lora_assets.partitions import dataset_dates
with dg.DagsterInstance.get() as instance:
    instance.add_dynamic_partitions(dataset_dates.name, ["2026-06-01"])
    result = defs.resolve_job_def("train_and_export").execute_in_process(
        instance=instance, partition_key="2026-06-01", raise_on_error=False,
        asset_selection=[
            dg.AssetKey(["brain", name]) for name in ("merged_dataset", "dataset_profile", "training_plan")
        ],
    )
    print([event.step_key for event in result.all_events if event.is_step_failure])
"""


def test_a_failed_steps_events_and_output_hold_no_secret(secretive: Loop) -> None:
    (secretive.root / "dagster").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FAILING],
        env=secretive.environment | H2O | {"DAGSTER_HOME": str(secretive.root / "dagster")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    # The plan asks the run log what earlier trainings took.
    assert "training_plan" in done.stdout, done.stdout + done.stderr[-2000:]
    assert MARK not in done.stdout + done.stderr
    assert written(secretive) == []


# All that the webserver is told of the code: assets, resources with their configuration, jobs, sensors.
SNAPSHOT = """
from dagster._core.remote_representation.external_data import RepositorySnap
from dagster_shared.serdes import serialize_value
from lora_assets.definitions import defs
print(serialize_value(RepositorySnap.from_def(defs.get_repository_def())))
"""


def test_what_dagster_shows_of_the_code_holds_no_secret(secretive: Loop) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT],
        env=secretive.environment | H2O,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "H2O_API_KEY" in done.stdout, "the names of variables are shown"
    assert len(done.stdout) > 10_000
    assert MARK not in done.stdout + done.stderr


@pytest.mark.parametrize("command", [["config"], ["export-samples", "--since", "2026-06-01", "--until", "2026-06-02"]])
def test_no_command_prints_a_secret(secretive: Loop, command: list[str]) -> None:
    done = secretive.run(*command)
    assert MARK not in done.stdout + done.stderr
