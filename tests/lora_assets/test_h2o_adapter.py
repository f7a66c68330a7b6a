"""The asset `adapter` with TRAINING_BACKEND=h2o: real processes without any training library, real HTTP, real rows."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune.base_model.models import BaseModelRef
from finetune.layout import DataLayout
from finetune.publishing import read_manifest
from lora_assets.cli.demo import DEMO_SETTINGS, EXAMPLES
from lora_assets.definitions import cancel_rows, close_what_was_killed
from lora_assets.logs import TAGS
from lora_assets.settings import load_settings
from resources.postgres import EmbeddedPostgres
from resources.run_log import RunLog
from resources.training_run import TrainingRun
from tests.resources.h2o_server import KEY, Fault, H2OServer, Handler, adapter_files, archive, resets, says
from tests.resources.h2o_training import FAST

DATE = "2026-06-01"

# Loads the code location once, then forks for every run, as Dagster's fork server does for every step.
PROGRAM = """
import json, os, sys
for name in ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "safetensors"):
    sys.modules[name] = None
# What every run would import again.
import alembic.command, matplotlib.figure, polars, psycopg2, sqlalchemy
import dagster as dg
from lora_assets.definitions import defs
from lora_assets.partitions import dataset_dates
job = defs.resolve_job_def("train_and_export")
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        with dg.DagsterInstance.get() as instance:
            instance.add_dynamic_partitions(str(dataset_dates.name), [order["date"]])
            result = job.execute_in_process(
                instance=instance,
                partition_key=order["date"],
                asset_selection=[dg.AssetKey(["brain", name]) for name in order["assets"]],
                run_id=order["run_id"],
                tags=order["tags"],
                run_config={"ops": {"brain__training_plan": {"config": {"seed": order["seed"]}}}},
                raise_on_error=False,
            )
        os._exit(0 if result.success else 1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Site:
    """A data root, a server to delegate to, and the process that runs dates."""

    root: Path
    server: H2OServer
    process: subprocess.Popen[str]
    database: str
    environment: dict[str, str]
    seed: int = 0

    def start(self, *assets: str, **tags: str) -> tuple[str, int]:
        """Begin a run; returns its id and its process."""
        run_id = str(uuid.uuid4())
        order = {"date": DATE, "assets": assets, "run_id": run_id, "tags": tags, "seed": self.seed}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return run_id, int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> int:
        """Wait for the run's end; returns its process's exit code."""
        return int(self.line())

    def run(self, *assets: str, **tags: str) -> tuple[str, int]:
        run_id, _ = self.start(*assets, **tags)
        return run_id, self.end()

    def rows(self) -> list[TrainingRun]:
        """The rows of the run log, newest first."""
        log = RunLog(database_url=self.database, data_dir=str(self.root))
        try:
            return log.recent(100)
        finally:
            log.close()


@pytest.fixture(scope="module")
def site(tiny_model: BaseModelRef) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short:
        root, home = Path(short) / "root", Path(short) / "home"
        layout = DataLayout(root)
        for directory in (layout.base_models, layout.exports, home):
            directory.mkdir(parents=True)
        (layout.base_models / tiny_model.path.name).symlink_to(tiny_model.path)
        for file in EXAMPLES.glob(f"*{DATE}*"):
            (layout.exports / file.name).write_bytes(file.read_bytes())
        postgres, server = EmbeddedPostgres(Path(short) / "pg"), H2OServer()
        server.archive = archive(adapter_files(rank=16))
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            **DEMO_SETTINGS,
            "DATA_ROOT": str(root),
            "DAGSTER_HOME": str(home),
            "DATABASE_URL": postgres.url,
            "TRAINING_BACKEND": "h2o",
            "H2O_API_URL": server.url,
            "H2O_API_KEY": KEY,
            "H2O_TIMING": json.dumps({**FAST, "stalled": 0.5}),
        }
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        site = Site(root, server, process, postgres.url, environment)
        _, code = site.run("merged_dataset", "dataset_profile")
        assert code == 0
        yield site
        assert process.stdin is not None
        process.stdin.close()
        process.wait(120)
        server.close()
        postgres.close()


@pytest.fixture(autouse=True)
def another_training(site: Site) -> None:
    """Every test has a plan, and so an experiment, of its own."""
    site.seed += 1
    site.server.experiments.clear()
    site.server.datasets.clear()
    site.server.outcome = {"status": "finished"}
    site.server.extra = {"log_tail": "epoch 1 of 9"}
    site.server.calls.clear()


def instance_of(site: Site) -> dg.DagsterInstance:
    return dg.DagsterInstance.from_config(str(site.root.parent / "home"))


def test_the_step_needs_no_training_library_and_says_where_it_trained(site: Site) -> None:
    run_id, code = site.run("training_plan", "adapter")
    assert code == 0
    url = f"{site.server.url}/api/experiments/exp%2F1"
    (row, *_) = site.rows()
    assert (row.status, row.backend_label, row.external_run_id) == ("COMPLETED", "Remote Training (H2O)", "exp/1")
    assert (row.external_run_url, row.dagster_run_id) == (url, run_id)
    assert row.training_run_id is not None
    manifest = read_manifest(DataLayout(site.root).adapter(row.training_run_id), kind="adapter", verify="hashes")
    assert manifest.inputs["experiment"] == {"id": "exp/1", "url": url}
    with instance_of(site) as instance:
        run = instance.get_run_by_id(run_id)
        assert run is not None
        assert run.tags["training"] == "Remote Training (H2O)"
        assert run.tags["external_run_id"] == "exp/1"
        key = dg.AssetKey(["brain", "adapter"])
        observed = instance.fetch_observations(key, limit=1).records[0].asset_observation
        made = instance.fetch_materializations(key, limit=1).records[0].asset_materialization
        log = "\n".join(entry.user_message for entry in instance.all_logs(run_id))
    assert observed is not None
    assert made is not None
    for metadata in (observed.metadata, made.metadata):
        assert metadata["training"].value == "Remote Training (H2O)"
        assert metadata["experiment"] == dg.MetadataValue.url(url)
    assert made.metadata["final_loss"].value == 0.5
    assert "remote training: 4/4 steps loss 0.5" in log


@pytest.mark.parametrize("stage", ["before-upload", "after-upload", "after-creation", "polling", "downloading"])
def test_a_step_killed_at_any_stage_and_retried_makes_one_experiment_and_one_row(site: Site, stage: str) -> None:
    server, reached, killed = site.server, threading.Event(), threading.Event()

    def stop(handler: Handler) -> bool:
        reached.set()
        killed.wait(180)
        return resets(handler)

    def stop_after_the_deed(handler: Handler) -> bool:
        handler.mute = True
        (handler.upload if stage == "after-upload" else handler.create)()
        return stop(handler)

    def stop_half_way(handler: Handler) -> bool:
        handler.half = True
        handler.download("exp%2F1")
        server.faults["download"].insert(0, stop)
        return True

    faults: dict[str, tuple[str, Fault]] = {
        "before-upload": ("upload", stop),
        "after-upload": ("upload", stop_after_the_deed),
        "after-creation": ("create", stop_after_the_deed),
        "polling": ("poll", stop),
        "downloading": ("download", stop_half_way),
    }
    call, fault = faults[stage]
    server.faults[call] = [fault]
    before = len(site.rows())
    first, pid = site.start("training_plan", "adapter")
    assert reached.wait(180)
    os.kill(pid, signal.SIGKILL)
    assert site.end() == -signal.SIGKILL, "otherwise the fault did not strike"
    killed.set()
    (row, *_) = site.rows()
    assert (row.status, row.dagster_run_id) == ("RUNNING", first)
    second, code = site.run("adapter", **{"dagster/root_run_id": first, "dagster/parent_run_id": first})
    assert code == 0
    assert (len(server.experiments), len(server.datasets)) == (1, 1)
    (row, *others) = site.rows()
    assert len(others) == before
    assert (row.status, row.attempts, row.dagster_run_id) == ("COMPLETED", 2, second)
    assert row.external_run_id == "exp/1"
    if stage == "downloading":
        assert server.range_headers[-1] == f"bytes={len(server.archive) // 2}-"


def vanish(site: Site) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        site.server.experiments.clear()
        return False

    return fault


def freeze(site: Site) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        site.server.hold.clear()
        return False

    return fault


@pytest.mark.parametrize(
    ("outcome", "fault", "said"),
    [
        ({"status": "failed", "error": "no memory"}, None, "failed on the H2O server: no memory"),
        ({"status": "stopped"}, None, "was stopped on the H2O server"),
        ({"status": "finished"}, vanish, "no such experiment"),
        ({"status": "finished"}, freeze, "has stalled: no news for 0.5 s at step 1"),
    ],
    ids=["failed", "stopped", "vanished", "stalled"],
)
def test_an_experiment_that_ends_badly_is_a_failed_row_with_the_end_of_its_log(
    site: Site, outcome: dict[str, Any], fault: Callable[[Site], Fault] | None, said: str
) -> None:
    site.server.outcome = outcome
    if fault:
        site.server.faults["poll"] = [lambda handler: False, fault(site)]
    try:
        run_id, code = site.run("training_plan", "adapter")
    finally:
        site.server.hold.set()
    assert code == 1
    assert not site.server.faults["poll"], "otherwise the fault did not strike"
    (row, *_) = site.rows()
    assert (row.status, row.external_run_id, row.attempts) == ("FAILED", "exp/1", 1)
    assert row.error_message is not None
    assert said in row.error_message
    assert "epoch 1 of 9" in row.error_message
    with instance_of(site) as instance:
        run = instance.get_run_by_id(run_id)
        assert run is not None
        assert run.status == dg.DagsterRunStatus.FAILURE


def interrupt(site: Site, *, cancelled: bool) -> tuple[str, TrainingRun]:
    """Interrupt a run while its experiment trains, as Dagster does; returns its id and its row.

    The process is killed before its executor, which is no cluster's, tries the step again.
    """
    site.server.total_steps = 100_000
    polled = threading.Event()

    def note(handler: Handler) -> bool:
        polled.set()
        return False

    site.server.faults["poll"] = [lambda handler: False, note]
    try:
        run_id, pid = site.start("training_plan", "adapter")
        assert polled.wait(180)
        if cancelled:
            with instance_of(site) as instance:
                run = instance.get_run_by_id(run_id)
                assert run is not None
                instance.report_run_canceling(run)
        os.kill(pid, signal.SIGINT)
        deadline = time.monotonic() + 180
        while (row := site.rows()[0]).status == "RUNNING":
            assert time.monotonic() < deadline, "the interrupt had no effect"
            time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        assert site.end() == -signal.SIGKILL
        return run_id, row
    finally:
        site.server.total_steps = 4


def test_an_interrupt_that_is_no_cancellation_leaves_the_experiment_to_the_next_attempt(site: Site) -> None:
    first, row = interrupt(site, cancelled=False)
    assert (row.status, row.error_message) == ("FAILED", "the step was interrupted")
    assert "cancel" not in site.server.calls
    assert site.server.experiments["exp/1"]["status"] == "running"
    _, code = site.run("adapter", **{"dagster/root_run_id": first, "dagster/parent_run_id": first})
    assert code == 0
    (row, *_) = site.rows()
    assert (row.status, row.attempts, row.external_run_id) == ("COMPLETED", 2, "exp/1")
    assert len(site.server.experiments) == 1


def test_ctrl_c_on_a_command_ends_it_and_leaves_the_experiment(site: Site) -> None:
    polled = threading.Event()
    site.server.faults["poll"] = [lambda handler: polled.set() or False]
    site.server.total_steps = 100_000
    try:
        _, pid = site.start("training_plan", "adapter", **TAGS)
        assert polled.wait(180)
        os.kill(pid, signal.SIGINT)
        assert site.end() == 1, "it ended by itself, and did not try again"
    finally:
        site.server.total_steps = 4
    assert site.rows()[0].error_message == "the step was interrupted"
    assert "cancel" not in site.server.calls
    assert site.server.experiments["exp/1"]["status"] in ("queued", "running")


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ([], "the run was cancelled; its experiment was cancelled"),
        ([says(503)] * 1000, "the run was cancelled; its experiment may still run: the H2O server could not be"),
        ([says(405)], "the run was cancelled; it has no experiment, or the server cannot cancel it"),
    ],
    ids=["cancelled", "server-down", "not-offered"],
)
def test_a_cancelled_run_says_what_became_of_its_experiment_and_the_server_is_told_until_it_answers(
    site: Site, monkeypatch: pytest.MonkeyPatch, faults: list[Fault], said: str
) -> None:
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    site.server.faults["cancel"] = list(faults)
    _, row = interrupt(site, cancelled=True)
    assert site.server.faults["cancel"] != faults or not faults, "otherwise the fault did not strike"
    site.server.faults["cancel"].clear()
    assert row.status == "FAILED"
    assert (row.error_message or "").startswith(said)
    assert (site.server.experiments["exp/1"]["status"] == "stopped") == (not faults)
    asked = len(site.server.calls)
    with instance_of(site) as instance:
        assert close_what_was_killed(load_settings(), instance) == []
    if len(faults) > 1:
        assert site.server.experiments["exp/1"]["status"] == "stopped"
        assert site.rows()[0].error_message == "the run was cancelled; its experiment was cancelled"
    else:
        assert len(site.server.calls) == asked, "whoever has answered is not asked again"


def test_what_finds_a_killed_run_first_cancels_the_experiment_of_one_that_was_cancelled(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    polled = threading.Event()
    site.server.faults["poll"] = [lambda handler: polled.set() or False]
    site.server.total_steps = 100_000
    try:
        run_id, pid = site.start("training_plan", "adapter")
        assert polled.wait(180)
        os.kill(pid, signal.SIGKILL)
        assert site.end() == -signal.SIGKILL
    finally:
        site.server.total_steps = 4
    row = site.rows()[0]
    assert row.status == "RUNNING"
    with instance_of(site) as instance:
        run = instance.get_run_by_id(run_id)
        assert run is not None
        instance.report_run_canceled(run)
        assert "cancel" not in site.server.calls
        assert close_what_was_killed(load_settings(), instance) == [f"closed row {row.id}"]
    assert site.server.experiments["exp/1"]["status"] == "stopped"
    closed = site.rows()[0]
    assert (closed.id, closed.status) == (row.id, "FAILED")
    assert closed.error_message == "the run was cancelled; its experiment was cancelled"
    assert cancel_rows(load_settings(), run_id, "the run was cancelled") == [], "nothing is left to the sensor"
    assert site.server.calls.count("cancel") == 1


def test_the_key_is_in_nothing_that_any_of_these_runs_wrote(site: Site) -> None:
    # A server that repeats what it was sent, in every way.
    site.server.faults["poll"] = [says(500, f"Authorization: Bearer {KEY}".encode())]
    site.server.outcome = {"status": "failed", "error": f"bad {KEY}", "log_tail": f"curl -H 'Bearer {KEY}'"}
    _, code = site.run("training_plan", "adapter")
    assert code == 1
    assert f"Bearer {KEY}" in site.server.authorizations
    (row, *_) = rows = site.rows()
    assert "bad ***" in (row.error_message or "")
    assert KEY not in "".join(row.model_dump_json() for row in rows)
    looked_at = set()
    for path in site.root.parent.rglob("*"):
        if path.is_file():
            looked_at.add(path.relative_to(site.root.parent).parts[0])
            assert KEY.encode() not in path.read_bytes(), path
    # The data root; Dagster's runs, events and captured output; the database.
    assert looked_at == {"root", "home", "pg"}
