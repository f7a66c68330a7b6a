"""`hpo_study` as a run of Dagster's own, a process per step, one of which is killed while it trains."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dagster as dg

from finetune.base_model.models import BaseModelRef
from finetune.dataset.discovery import discover_exports
from finetune.dataset.prepare import prepare_dataset
from finetune.layout import DataLayout
from finetune.publishing import read_manifest
from finetune.training.checkpoints import newest_complete
from lora_assets.partitions import dataset_dates
from resources.artifact_store import ValueStore
from resources.postgres import EmbeddedPostgres
from resources.study import StudyStore
from tests.profiles import PROFILE

DATE = "2026-06-01"
STEPS = 24
CONFIG = {
    "max_trials": 2,
    "strategy": "random",
    "workers": 2,
    "parameters": ["learning_rate"],
    "fixed": {"max_steps": STEPS, "micro_batch": 1, "accumulation": 1, "max_length": 64},
    "tokens_per_second": 1000,
}
TRAINS = """
    SELECT training_run_id, pid FROM lora_training_runs JOIN lora_training_run_details USING (id)
    WHERE status = 'RUNNING' ORDER BY id
"""


def prepare(layout: DataLayout) -> None:
    """What `hpo_study` is made from, as the assets before it leave it."""
    layout.exports.mkdir(parents=True)
    lines = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(30)]
    (layout.exports / f"brain_dataset_{DATE}.jsonl").write_text("".join(lines))
    dataset = prepare_dataset(discover_exports(layout.exports), date=DATE, layout=layout)
    values = ValueStore(directory=str(layout.asset_values))
    for name, value in (("merged_dataset", dataset), ("dataset_profile", PROFILE)):
        path = values.path_of(dg.AssetKey(["brain", name]), DATE)
        path.parent.mkdir(parents=True)
        path.write_text(value.model_dump_json())


def process_with_a_checkpoint(database: str, layout: DataLayout, run: subprocess.Popen[bytes], log: Path) -> int:
    """Wait for a training that has a checkpoint; returns the process that trains."""
    import sqlalchemy as sa

    server = sa.create_engine(database, poolclass=sa.NullPool)
    deadline = time.monotonic() + 500
    while True:
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
        with server.connect() as connection:
            if not sa.inspect(connection).has_table("lora_training_run_details"):
                continue
            rows = connection.execute(sa.text(TRAINS)).all()
        for training, pid in rows:
            if newest_complete(layout.work(training) / "checkpoints"):
                return int(pid)


def test_the_trial_of_a_killed_step_is_gone_on_with_and_the_run_succeeds(tiny_model: BaseModelRef) -> None:
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short:
        layout, home, log = DataLayout(Path(short) / "root"), Path(short) / "home", Path(short) / "run.log"
        prepare(layout)
        home.mkdir()
        (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        postgres = EmbeddedPostgres(Path(short) / "pg")
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "DATA_ROOT": str(layout.root),
            "DAGSTER_HOME": str(home),
            "DATABASE_URL": postgres.url,
            "BASE_MODEL_NAME": str(tiny_model.path),
            "CHECKPOINT_SECONDS": "0",
            "OMP_NUM_THREADS": "1",
        }
        with dg.DagsterInstance.from_config(str(home)) as instance:
            instance.add_dynamic_partitions(str(dataset_dates.name), [DATE])
        with log.open("wb") as output:
            run = subprocess.Popen(
                [
                    *(sys.executable, "-m", "dagster", "asset", "materialize", "-m", "lora_assets.definitions"),
                    *("--select", "brain/hpo_study", "--partition", DATE),
                    "--config-json",
                    json.dumps({"ops": {"brain__hpo_study": {"ops": {"open_study": {"config": CONFIG}}}}}),
                ],
                cwd=short,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            killed = process_with_a_checkpoint(postgres.url, layout, run, log)
            os.kill(killed, signal.SIGKILL)
            assert run.wait(500) == 0, log.read_text()
        finally:
            run.kill()
            run.wait()

        with dg.DagsterInstance.from_config(str(home)) as instance:
            (record,) = instance.get_run_records()
            events = [entry.dagster_event for entry in instance.all_logs(record.dagster_run.run_id)]
        told = [event for event in events if event is not None]
        (again,) = [event for event in told if event.event_type_value == "STEP_UP_FOR_RETRY"]
        assert str(again.step_key).startswith("brain__hpo_study.work_on_trials[")
        assert any("signal 9" in str(event.message) for event in told), "otherwise no step was killed"
        (made,) = [event.step_materialization_data.materialization for event in told if event.is_step_materialization]
        assert made.metadata["total_trials"].value == 2

        studies = StudyStore(database_url=postgres.url, data_dir=short)
        (name,) = studies.experiments()
        history = studies.find_experiment(name).history()
        rows = {row.training_run_id: row for row in studies.recent()}
        studies.close()
        assert [trial.state for trial in history] == ["completed", "completed"]
        assert sorted(trial.attempts for trial in history) == [1, 2]
        # Each trial is one training, and the killed one went on where it was.
        assert set(rows) == {trial.run_id for trial in history}
        for trial in history:
            row = rows[trial.run_id]
            assert (row.status, row.attempts) == ("COMPLETED", trial.attempts)
            adapter: dict[str, Any] = read_manifest(layout.adapter(trial.run_id)).results
            assert adapter["training_steps"] == STEPS
            assert (adapter["resumed_from_step"] > 0) == (trial.attempts == 2)
        postgres.close()
