"""`curriculum_adapter` as a run on a real Dagster instance, and killed between and within its stages."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune.adapter_files import WEIGHTS_NAME, adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.dataset.prepare import prepare_dataset
from finetune.dataset.profile import profile_dataset
from finetune.evaluation.losses import read_losses
from finetune.progress import ignore_progress
from finetune.publishing import read_manifest, sha256_file
from finetune.search.curriculum.report import CurriculumReport, change
from finetune.search.curriculum.spec import CurriculumSpec
from finetune.training.init_adapter import read_init_adapter
from lora_assets.assets import curriculum
from lora_assets.assets.common import COMMON
from lora_assets.curriculum import open_curriculum
from lora_assets.laboratory import bench_of
from lora_assets.partitions import dataset_dates
from lora_assets.settings import Settings
from resources.artifact_store import ValueStore
from resources.base_model import BaseModelSource
from resources.run_log import RunLog
from tests.lora_assets.traces import traced

DATE = "2026-06-01"
PROGRAM = str(Path(sys.executable).with_name("lora-assets"))
CONFIG: dict[str, Any] = {
    "goal": "what is easy first",
    "by": "base_loss",
    "stages": [
        {"name": "easy", "learning_rate": 2e-3},
        {"name": "hard", "replay": 0.5},
    ],
    "fixed": {"micro_batch": 4, "accumulation": 1, "max_length": 64, "epochs": 1, "learning_rate": 1e-3},
    "tokens_per_second": 1000.0,
}
# While base losses are measured, while the first stage trains, between the stages, and while the second one trains.
MOMENTS = [
    "loss of the base model",
    "easy: training: 2/",
    "easy: evaluate",
    "hard: training: 3/",
]


def write_exports(settings: Settings) -> None:
    settings.layout.exports.mkdir(parents=True, exist_ok=True)
    records = [{"instruction": f"Question {i}?", "output": f"Answer {'very ' * (i % 7)}{i}."} for i in range(30)]
    path = settings.layout.exports / f"brain_dataset_{DATE}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Equal bits need equal threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def materialize(settings: Settings, tiny_model: BaseModelRef, config: dict[str, Any]) -> dg.ExecuteInProcessResult:
    layout = settings.layout

    @dg.asset(**COMMON)
    def merged_dataset() -> PreparedDataset:
        return prepare_dataset(discover_exports(layout.exports), date=DATE, layout=layout)

    @dg.asset(**COMMON)
    def dataset_profile(merged_dataset: PreparedDataset) -> DatasetProfile:
        return profile_dataset(merged_dataset, encoder=RecordEncoder.load(tiny_model.path))

    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(str(dataset_dates.name), [DATE])
        return dg.materialize(
            [merged_dataset, dataset_profile, curriculum.curriculum_adapter],
            partition_key=DATE,
            instance=instance,
            resources={
                "io_manager": ValueStore(directory=str(layout.asset_values)),
                "base_model": BaseModelSource(name=str(tiny_model.path), cache_dir=str(settings.data_root)),
                "run_log": RunLog(data_dir=str(settings.data_root)),
            },
            run_config={"ops": {"brain__curriculum_adapter": {"config": config}}},
            raise_on_error=False,
        )


def metadata_of(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    assert result.success
    (event,) = result.asset_materializations_for_node("brain__curriculum_adapter")
    return {name: value.value for name, value in event.metadata.items()}


@pytest.fixture(scope="module")
def settings() -> Iterator[Settings]:
    """Of a data root whose path is short enough for the socket of an embedded server."""
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short:
        found = Settings(data_root=Path(short))
        write_exports(found)
        yield found


@pytest.fixture(scope="module")
def whole(settings: Settings, tiny_model: BaseModelRef, one_thread: None) -> dict[str, Any]:
    """The metadata of a run that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curriculum, "SETTINGS", settings)
        return metadata_of(materialize(settings, tiny_model, CONFIG))


def report_of(told: dict[str, Any]) -> CurriculumReport:
    return CurriculumReport.model_validate_json(Path(told["report"]).with_name("report.json").read_bytes())


def test_a_curriculum_carries_one_adapter_through_its_stages_and_is_compared_with_the_same_shuffled(
    settings: Settings, whole: dict[str, Any]
) -> None:
    report = report_of(whole)
    easy, hard = report.stages
    assert (easy.began_with, hard.began_with, report.shuffled.began_with) == (None, easy.run_id, None)
    assert easy.difficulty is not None
    assert hard.difficulty is not None
    assert easy.difficulty[1] <= hard.difficulty[0]
    assert (easy.learning_rate, hard.learning_rate, report.shuffled.learning_rate) == (2e-3, 1e-3, 1e-3)
    assert hard.replayed == round(easy.records / 2)
    assert report.shuffled.steps == easy.steps + hard.steps == whole["steps"]
    assert report.shuffled.records == easy.records + hard.records
    assert report.held_out_records < 6
    assert whole["verdict"] == "undecided"
    assert f"{report.held_out_records} held-out records are too few to tell" in report.conclusion
    assert whole["conclusion"] == report.conclusion
    assert f"after {report.steps} steps each" in report.conclusion
    assert easy.change < 0, "the first stage learns"
    assert [row.data["stage"] for row in whole["stages"].records] == ["easy", "hard", "shuffled"]
    assert whole["held_out"].startswith("![](data:image/png;base64,")
    page = Path(whole["report"]).read_text()
    assert report.conclusion.replace("'", "&#39;") in page
    assert "http" not in page.replace("http-equiv", "")
    # Each training is in the run log like any other.
    log = RunLog(data_dir=str(settings.data_root))
    try:
        rows = {row.training_run_id: row.status for row in log.recent()}
    finally:
        log.close()
    assert rows == {each.run_id: "COMPLETED" for each in (*report.stages, report.shuffled)}


def test_every_figure_is_computed_again_from_the_evaluations_that_the_report_names(
    settings: Settings, whole: dict[str, Any]
) -> None:
    report = report_of(whole)
    manifest = traced(Path(whole["report"]).parent, settings.layout)
    assert [entry.run_id for entry in manifest.trainings] == whole["run_ids"].split(", ")
    assert manifest.figures["hard.change"].runs == [stage.run_id for stage in report.stages]
    trainings = {each.run_id: each for each in (*report.stages, report.shuffled)}
    assert {run_id for run_ids in report.figures.values() for run_id in run_ids} == set(trainings)
    for each in trainings.values():
        assert sha256_file(each.evaluation / "report.json") == each.evaluation_sha256
        assert adapter_hash(each.adapter_path) == each.adapter_hash
        assert read_manifest(each.dataset_path, verify="hashes").results["fingerprint"] == each.dataset_fingerprint
        losses = read_losses(each.evaluation)
        assert each.eval_loss == pytest.approx(sum(losses.nats) / sum(losses.tokens))
    last, rival = (read_losses(trainings[run_id].evaluation) for run_id in report.figures["difference"])
    difference, ci95 = change(rival.nats, last, seed=42)
    assert (difference, ci95) == (report.difference, report.difference_ci95)


def test_the_adapter_is_published_in_peft_s_layout_with_all_its_stages_named(
    settings: Settings, tiny_model: BaseModelRef, whole: dict[str, Any]
) -> None:
    from finetune.evaluation.adapters import load_adapter, load_base

    report = report_of(whole)
    adapter = Path(whole["path"])
    manifest = read_manifest(adapter, kind="adapter", verify="hashes")
    assert [stage["run_id"] for stage in manifest.inputs["stages"]] == [stage.run_id for stage in report.stages]
    assert manifest.inputs["compared_with"]["run_id"] == report.shuffled.run_id
    assert (manifest.results["verdict"], manifest.results["run_id"]) == (report.verdict, report.name)
    assert adapter_hash(adapter) == manifest.results["adapter_hash"] == report.stages[-1].adapter_hash
    assert load_adapter(load_base(tiny_model), adapter).peft_config
    logged = [json.loads(line)["stage"] for line in (adapter / "training_log.jsonl").read_text().splitlines()]
    assert logged == ["easy"] * report.stages[0].steps + ["hard"] * report.stages[1].steps
    card = (adapter / "README.md").read_text()
    assert "## Curriculum" in card
    assert report.conclusion in card
    # Another training may begin with it, under its own name.
    assert read_init_adapter(adapter).run_id == report.name
    assert not settings.layout.registry.exists(), "nothing makes it champion"


def test_a_curriculum_that_was_killed_between_and_within_its_stages_ends_bit_identical(
    tiny_model: BaseModelRef, whole: dict[str, Any]
) -> None:
    undisturbed = report_of(whole)
    content = {**CONFIG, "task": "instruction", "base_model": str(tiny_model.path)}
    environment = {
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_COLOR": "1",
    }
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short:
        root = Path(short) / "data"
        write_exports(Settings(data_root=root))
        killed = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.lora_assets.curriculum_process",
                str(root),
                json.dumps(content),
                *MOMENTS,
                "",
            ],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert killed.stdout.splitlines() == [*(f"{moment}: -9" for moment in MOMENTS), ": 0"], killed.stderr
        (Path(short) / "spec.yaml").write_text(json.dumps(content))
        ended = subprocess.run(
            [PROGRAM, "experiment", "curriculum", "spec.yaml", "--json"],
            cwd=short,
            env={**environment, "DATA_ROOT": "data"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr
        told = json.loads(ended.stdout)
        again = CurriculumReport.model_validate(told["data"])
        for ours, theirs in zip(
            (*again.stages, again.shuffled), (*undisturbed.stages, undisturbed.shuffled), strict=True
        ):
            assert (ours.run_id, ours.adapter_hash) == (theirs.run_id, theirs.adapter_hash)
            weights, undisturbed_weights = (each.adapter_path / WEIGHTS_NAME for each in (ours, theirs))
            assert weights.read_bytes() == undisturbed_weights.read_bytes()
            assert (ours.eval_loss, ours.change) == (theirs.eval_loss, theirs.change)
            resumed = read_manifest(ours.adapter_path).results["resumed_from_step"]
            assert resumed == {"easy": 1, "hard": 2, "shuffled": 0}[ours.name], "the fault struck"
        assert (again.name, again.difference, again.difference_ci95, again.conclusion) == (
            undisturbed.name,
            undisturbed.difference,
            undisturbed.difference_ci95,
            undisturbed.conclusion,
        )
        assert told["artifacts"][0] == str(root / "adapters" / "brain" / again.name)


def test_an_equal_curriculum_trains_nothing_anew_and_a_dry_run_prices_it(
    settings: Settings, tiny_model: BaseModelRef, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curriculum, "SETTINGS", settings)
    adapters = sorted(path.stat().st_mtime_ns for path in (settings.data_root / "adapters/brain").iterdir())
    again = metadata_of(materialize(settings, tiny_model, {**CONFIG, "goal": "said otherwise"}))
    assert (again["name"], again["adapter_hash"]) == (whole["name"], whole["adapter_hash"])
    assert sorted(path.stat().st_mtime_ns for path in (settings.data_root / "adapters/brain").iterdir()) == adapters

    # Base losses are known by now, so that the stages are the very ones.
    priced = metadata_of(materialize(settings, tiny_model, {**CONFIG, "dry_run": True}))
    rows = [row.data for row in priced["proposed"].records]
    assert [(row["stage"], row["tokens"]) for row in rows] == [
        (each.name, each.tokens) for each in (*report_of(whole).stages, report_of(whole).shuffled)
    ]
    assert priced["estimated_gpu_hours"] == pytest.approx(sum(row["gpu_hours"] for row in rows))

    # What is trained takes no more time; of another seed, it would have to be trained, and takes longer than it may.
    monkeypatch.setattr(curriculum, "SETTINGS", settings.model_copy(update={"max_gpu_hours": 1e-6}))
    assert metadata_of(materialize(settings, tiny_model, CONFIG))["name"] == whole["name"]
    refused = materialize(settings, tiny_model, {**CONFIG, "fixed": {**CONFIG["fixed"], "seed": 1}})
    assert not refused.success
    (failure,) = [event for event in refused.all_events if event.is_step_failure]
    assert "MAX_GPU_HOURS" in str(failure.step_failure_data.error)


def test_a_dry_run_on_the_command_line_needs_no_training_library_and_no_database(
    tiny_model: BaseModelRef, tmp_path: Path
) -> None:
    records = [{"instruction": f"Question {i}?", "output": "Yes. " * (1 + i % 9)} for i in range(40)]
    for name, part in (("all", records), ("easy", records[:20]), ("hard", records[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    (tmp_path / "spec.yaml").write_text(
        f"dataset_path: all.jsonl\nbase_model: {tiny_model.path}\ntokens_per_second: 1000\n"
        "stages:\n- {name: easy, files: [easy.jsonl]}\n- {name: hard, files: [hard.jsonl], replay: 0.2}\n"
    )
    script = (
        "import sys\n"
        "from lora_assets.cli.app import app\n"
        "app(['experiment', 'curriculum', 'spec.yaml', '--dry-run', '--json'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets', 'bitsandbytes', 'accelerate'} "
        "& set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "GPU_HOUR_PRICE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    result = json.loads(done.stdout)
    rows = result["data"]["proposed"]
    assert [row["stage"] for row in rows] == ["easy", "hard", "shuffled"]
    assert rows[2]["steps"] == rows[0]["steps"] + rows[1]["steps"]
    assert result["metadata"]["estimated_price"] == pytest.approx(2 * sum(row["gpu_hours"] for row in rows))
    held_out = sum(file["held_out"] for file in result["data"]["files"])
    assert held_out > 0, "both files hold records of the dataset that is evaluated on"
    assert sum(row["records"] - row["replayed"] for row in rows[:2]) == 40 - held_out
    assert not (tmp_path / "data" / "adapters").exists()
    assert not (tmp_path / "data" / "postgres").exists()


def test_what_the_list_names_by_an_id_of_the_exports_is_not_learned_by_way_of_a_file_without_ids(
    tiny_model: BaseModelRef, tmp_path: Path
) -> None:
    records = [{"instruction": f"Question {i}?", "output": f"Answer {i}."} for i in range(40)]
    settings = Settings(data_root=tmp_path / "data", deletion_list=tmp_path / "deletions.txt")
    settings.layout.exports.mkdir(parents=True)
    (settings.layout.exports / f"brain_dataset_{DATE}.jsonl").write_text(
        "".join(json.dumps({"id": f"r{i}", **record}) + "\n" for i, record in enumerate(records))
    )
    (tmp_path / "deletions.txt").write_text("r3\nr30\n")
    for name, part in (("easy", records[:20]), ("hard", records[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    dataset = prepare_dataset(
        discover_exports(settings.exports), date=DATE, layout=settings.layout, parameters=settings.prepare_parameters
    )
    profile = profile_dataset(dataset, encoder=RecordEncoder.load(tiny_model.path))
    stages = [{"name": name, "files": [tmp_path / f"{name}.jsonl"]} for name in ("easy", "hard")]
    spec = CurriculumSpec.model_validate({"stages": stages})
    opened = open_curriculum(settings, spec, bench_of(settings, dataset, profile, tiny_model), ignore_progress)
    assert [file.left_out for file in opened.files] == [1, 1]


def test_the_curriculum_step_asks_for_a_gpu() -> None:
    wanted = curriculum.curriculum_adapter.op.tags["dagster-k8s/config"]
    assert json.loads(wanted)["container_config"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert curriculum.curriculum_adapter.op.pool == "gpu"
