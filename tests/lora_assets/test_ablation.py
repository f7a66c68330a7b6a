"""An ablation as a process that is killed, and as an asset on a real Dagster instance that goes on from there."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from finetune.base_model.models import BaseModelRef
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.dataset.prepare import prepare_dataset
from finetune.dataset.profile import profile_dataset
from finetune.errors import ArtifactError, ConfigurationError
from finetune.evaluation.losses import read_losses
from finetune.progress import ProgressEvent, ignore_progress
from finetune.publishing import read_manifest, sha256_file
from finetune.search.ablation.spec import AblationSpec, arms_of
from finetune.search.models import StepResult
from finetune.search.spec import spec_of
from lora_assets.ablation import run_ablation
from lora_assets.assets import ablation
from lora_assets.assets.common import COMMON
from lora_assets.laboratory import Laboratory, make_bench, request_for, train
from lora_assets.partitions import dataset_dates
from lora_assets.settings import Settings
from resources.artifact_store import ValueStore
from resources.base_model import BaseModelSource
from resources.run_log import RunLog
from tests.lora_assets.traces import traced

DATE = "2026-06-01"
FIXED = {"max_steps": 3, "micro_batch": 1, "accumulation": 1, "max_length": 64, "lora_rank": 4}
# What one rank is worth, and a rate at which a training ends in numbers that are none.
CONFIG: dict[str, Any] = {
    "goal": "what the rank is worth",
    "parameters": {"lora_rank": [2], "learning_rate": [1e30]},
    "fixed": FIXED,
    "seeds": 2,
    "seed": 42,
}
RANK_ALONE = {**CONFIG, "parameters": {"lora_rank": [2]}}


def command(directory: Path, tiny_model: BaseModelRef, *arguments: str, **environment: str) -> dict[str, Any]:
    own = {"DATA_ROOT": "data", "BASE_MODEL_NAME": str(tiny_model.path), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return {
        "args": [str(Path(sys.executable).with_name("lora-assets")), *arguments],
        "cwd": directory,
        "env": {"PATH": os.environ["PATH"], "OMP_WAIT_POLICY": "PASSIVE", **own, **environment},
        "text": True,
    }


def printed(directory: Path, tiny_model: BaseModelRef, *arguments: str, **environment: str) -> str:
    done = subprocess.run(**command(directory, tiny_model, *arguments, **environment), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def adapters(directory: Path) -> dict[Path, int]:
    """The published adapters, by what tells whether one was published again."""
    return {path: path.stat().st_ino for path in (directory / "data/adapters/brain").glob("*/manifest.json")}


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A directory with exports, whose path is short enough for the socket of an embedded server."""
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short:
        exports = Path(short, "data/datasets/brain")
        exports.mkdir(parents=True)
        lines = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(60)]
        (exports / f"brain_dataset_{DATE}.jsonl").write_text("".join(lines))
        for name, content in (("all", CONFIG), ("rank", RANK_ALONE)):
            dated = {**content, "dataset_date": DATE, "tokens_per_second": 100}
            Path(short, f"{name}.yaml").write_text(yaml.safe_dump(dated, sort_keys=False))
        yield Path(short)


@pytest.fixture(scope="module")
def settings(directory: Path) -> Settings:
    return Settings(data_root=directory / "data")


@pytest.fixture(scope="module")
def killed(directory: Path, tiny_model: BaseModelRef) -> dict[Path, int]:
    """The adapters that were there when the command was killed in its second training."""
    asked = command(directory, tiny_model)
    killed_command = str(Path(__file__).with_name("killed_command.py"))
    asked["args"] = [sys.executable, killed_command, "the base configuration, seed 43", "ablation", "all.yaml"]
    done = subprocess.run(**asked, stderr=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "6 of 6 trainings to do, of about" in done.stderr
    return adapters(directory)


def materialize(settings: Settings, tiny_model: BaseModelRef, config: dict[str, Any]) -> dict[str, Any]:
    """The metadata of the asset, materialized on an instance of its own."""
    layout = settings.layout

    @dg.asset(**COMMON)
    def merged_dataset() -> PreparedDataset:
        return prepare_dataset(
            discover_exports(layout.exports), date=DATE, layout=layout, parameters=settings.prepare_parameters
        )

    @dg.asset(**COMMON)
    def dataset_profile(merged_dataset: PreparedDataset) -> DatasetProfile:
        return profile_dataset(merged_dataset)

    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.ephemeral() as instance:
        patch.setattr(ablation, "SETTINGS", settings)
        instance.add_dynamic_partitions(str(dataset_dates.name), [DATE])
        result = dg.materialize(
            [merged_dataset, dataset_profile, ablation.ablation_report],
            partition_key=DATE,
            instance=instance,
            resources={
                "io_manager": ValueStore(directory=str(layout.asset_values)),
                "base_model": BaseModelSource(name=str(tiny_model.path), cache_dir=str(settings.data_root)),
                "run_log": RunLog(data_dir=str(settings.data_root)),
            },
            run_config={"ops": {"brain__ablation_report": {"config": config}}},
        )
    (event,) = result.asset_materializations_for_node("brain__ablation_report")
    return {name: entry.value for name, entry in event.metadata.items()}


@pytest.fixture(scope="module")
def gone_on(killed: dict[Path, int], settings: Settings, tiny_model: BaseModelRef) -> dict[str, Any]:
    """The asset's metadata, and what it hands on, after it has gone on from there."""
    told = materialize(settings, tiny_model, CONFIG)
    value = settings.layout.asset_values / "brain/ablation_report" / f"{DATE}.json"
    return {**told, "result": StepResult.model_validate_json(value.read_bytes())}


def test_an_ablation_that_was_killed_repeats_no_training_and_tells_what_failed(
    killed: dict[Path, int], gone_on: dict[str, Any], settings: Settings, directory: Path
) -> None:
    assert len(killed) == 1
    assert killed.items() <= adapters(directory).items()
    base, rank, diverged = gone_on["result"].data["arms"]
    assert base["changed"] == {}
    assert base["trial_config"]["lora_rank"] == 4
    assert (rank["changed"], diverged["changed"]) == ({"lora_rank": 2}, {"learning_rate": 1e30})
    assert rank["verdict"] in ("better", "worse", "open")
    assert rank["difference"]["ci95"][0] < rank["difference"]["mean"] < rank["difference"]["ci95"][1]
    assert diverged["verdict"] == "failed"
    assert "with learning_rate 1e+30 2 of 2 trainings failed" in gone_on["conclusion"]
    assert gone_on["failed_trainings"] == 2
    # A CPU's hours are hours.
    hours = [run["gpu_hours"] for arm in (base, rank) for run in arm["runs"]]
    assert min(hours) > 0
    assert gone_on["gpu_hours_used"] == pytest.approx(sum(hours))

    # Trainings like any other, each with one row, in which the killed one's goes on.
    run_log = RunLog(data_dir=str(settings.data_root))
    try:
        rows = run_log.recent()
    finally:
        run_log.close()
    trained = [str(row.training_run_id) for row in rows if row.status == "COMPLETED"]
    assert sorted(trained) == sorted(run["run_id"] for arm in (base, rank) for run in arm["runs"])
    failed = [str(row.training_run_id) for row in rows if row.status == "FAILED"]
    assert sorted(failed) == sorted(run["run_id"] for run in diverged["runs"])
    assert sorted(row.attempts or 0 for row in rows) == [1, 1, 1, 1, 1, 2]


def test_every_figure_leads_to_the_adapter_and_the_evaluation_that_it_was_made_from(
    gone_on: dict[str, Any], settings: Settings
) -> None:
    result = gone_on["result"]
    manifest = traced(Path(gone_on["path"]), settings.layout)
    assert gone_on["run_ids"] == ", ".join(run["run_id"] for arm in result.data["arms"][:2] for run in arm["runs"])
    assert manifest.figures["lora_rank 2.mean"].value == result.data["arms"][1]["mean"]
    assert len(manifest.figures["lora_rank 2.difference"].runs) == 4
    for arm in result.data["arms"][:2]:
        for seed, run in zip((42, 43), arm["runs"], strict=True):
            assert run["seed"] == seed
            adapter = read_manifest(Path(run["adapter"]), kind="adapter")
            assert adapter.results["adapter_hash"] == run["adapter_hash"]
            report = Path(run["evaluation"], "report.json")
            assert sha256_file(report) == run["evaluation_sha256"]
            evaluation = json.loads(report.read_bytes())
            assert evaluation["eval_loss"] == run["loss"]
            records = read_losses(report.parent)
            assert len(records.lines) == len(records.nats) == evaluation["records"]
            assert sum(records.nats) / sum(records.tokens) == pytest.approx(run["loss"])
            assert sum(records.base_nats) / sum(records.tokens) == pytest.approx(evaluation["base_loss"])
        losses = [run["loss"] for run in arm["runs"]]
        assert losses[0] != losses[1]
        assert arm["mean"] == pytest.approx(sum(losses) / 2)
    assert json.loads(Path(gone_on["path"], "report.json").read_bytes()) == result.data
    base, rank = result.data["arms"][:2]
    assert rank["difference"]["mean"] == pytest.approx(rank["mean"] - base["mean"])


def test_the_asset_shows_table_pictures_and_conclusion(gone_on: dict[str, Any]) -> None:
    rows = [record.data for record in gone_on["configurations"].records]
    assert [row["configuration"] for row in rows] == ["the base configuration", "lora_rank 2", "learning_rate 1e+30"]
    assert rows[2]["verdict"] == "failed"
    for parameter in ("lora_rank", "learning_rate"):
        assert str(gone_on[parameter]).startswith("![](data:image/png;base64,")
    page = Path(gone_on["report"]).read_text()
    assert gone_on["conclusion"] in page
    assert rows[2]["note"] in page


def test_a_part_of_it_trains_nothing_and_a_whole_report_is_taken_as_it_is(
    gone_on: dict[str, Any], settings: Settings, directory: Path, tiny_model: BaseModelRef
) -> None:
    known = adapters(directory)
    told = materialize(settings, tiny_model, RANK_ALONE)
    assert told["failed_trainings"] == 0
    assert told["name"] != gone_on["name"]
    assert [record.data["mean"] for record in told["configurations"].records] == [
        record.data["mean"] for record in gone_on["configurations"].records[:2]
    ]
    report = Path(told["report"])
    made = report.stat().st_ino
    assert told["conclusion"] in printed(directory, tiny_model, "experiment", "ablation", "rank.yaml")
    assert report.stat().st_ino == made
    assert adapters(directory) == known


def test_who_works_on_the_same_ablation_is_waited_for(
    gone_on: dict[str, Any], settings: Settings, tiny_model: BaseModelRef
) -> None:
    spec = spec_of({**RANK_ALONE, "dataset_date": DATE}, AblationSpec, where="here")
    own = settings.model_copy(update={"base_model_name": str(tiny_model.path)})
    bench = make_bench(own, spec, ignore_progress, weights=True)
    run_log = RunLog(data_dir=str(settings.data_root))
    told: list[str] = []
    try:
        with ExitStack() as other:
            other.enter_context(run_log.lease(spec.name(bench.dataset.fingerprint, bench.base_model.fingerprint)))

            def tell(event: ProgressEvent) -> None:
                told.append(str(event))
                other.close()

            result = run_ablation(spec, bench, own, run_log, tell)
    finally:
        run_log.close()
    assert told[0].startswith("waiting for process")
    assert result.data["arms"][:1] == gone_on["result"].data["arms"][:1]


def test_a_row_that_was_left_running_when_its_adapter_was_published_is_completed(
    gone_on: dict[str, Any], settings: Settings, tiny_model: BaseModelRef
) -> None:
    spec = spec_of({**RANK_ALONE, "dataset_date": DATE}, AblationSpec, where="here")
    own = settings.model_copy(update={"base_model_name": str(tiny_model.path)})
    bench = make_bench(own, spec, ignore_progress, weights=True)
    run_log = RunLog(data_dir=str(settings.data_root))
    laboratory = Laboratory(bench, own, run_log, "ablation of another name")
    plan = arms_of(spec, bench)[0].plans[0]
    request = request_for(laboratory, plan)
    try:
        row = run_log.start(
            run_id=request.run_id,
            dataset_paths=[],
            base_model="tiny",
            backend="hf-peft",
            dagster_root_run_id=laboratory.label,
        )
        trained = train(laboratory, plan, on_progress=ignore_progress)
        assert trained.result.reused
        assert trained.request == request
        status = {each.id: each.status for each in run_log.recent()}
    finally:
        run_log.close()
    assert status[row] == "COMPLETED"
    assert gone_on["result"].data["arms"][0]["runs"][0]["run_id"] == request.run_id


def test_records_losses_that_were_altered_are_refused(gone_on: dict[str, Any], tmp_path: Path) -> None:
    evaluation = Path(gone_on["result"].data["arms"][0]["runs"][0]["evaluation"])
    (tmp_path / "losses.json").write_bytes((evaluation / "losses.json").read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="losses cannot be read"):
        read_losses(tmp_path)


def test_all_trainings_are_priced_and_refused_above_what_they_may_take_together(
    settings: Settings, directory: Path, tiny_model: BaseModelRef
) -> None:
    spec = spec_of(
        {**CONFIG, "fixed": {**FIXED, "max_steps": 40}, "tokens_per_second": 100, "dataset_date": DATE},
        AblationSpec,
        where="here",
    )
    Path(directory, "long.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    priced = printed(
        directory, tiny_model, "experiment", "ablation", "long.yaml", "--dry-run", "--json", GPU_HOUR_PRICE="2"
    )
    figures = json.loads(priced)
    hours = figures["metadata"]["estimated_gpu_hours"]
    assert figures["metadata"]["trainings"] == 6
    assert figures["metadata"]["estimated_price"] == pytest.approx(2 * hours)
    asked = materialize(settings, tiny_model, {**CONFIG, "dry_run": True, "tokens_per_second": 100.0})
    assert asked["status"] == "dry_run"
    assert len(asked["proposed"].records) == 3

    # Each may be trained alone, all of them may not.
    limited = settings.model_copy(update={"max_gpu_hours": hours / 2, "base_model_name": str(tiny_model.path)})
    bench = make_bench(limited, spec, ignore_progress, weights=True)
    run_log = RunLog(data_dir=str(settings.data_root))
    before = adapters(directory)
    try:
        with pytest.raises(ConfigurationError, match=r"6 trainings need about .*\[MAX_GPU_HOURS\]"):
            run_ablation(spec, bench, limited, run_log, ignore_progress)
    finally:
        run_log.close()
    assert adapters(directory) == before


def test_an_ablation_asks_for_one_gpu() -> None:
    wanted = ablation.ablation_report.op.tags["dagster-k8s/config"]
    assert json.loads(wanted)["container_config"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert ablation.ablation_report.op.pool == "gpu"
