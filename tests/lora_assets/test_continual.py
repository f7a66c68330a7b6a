"""Dates that go on from the champion of an earlier one, and what that costs: on a real Dagster instance."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from typer.testing import CliRunner

from finetune.adapter_files import adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.dataset.deletions import content_hash
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import PreparedDataset
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.prepare import prepare_dataset
from finetune.dataset.profile import profile_dataset
from finetune.errors import DatasetError
from finetune.planning.models import TrainingPlan
from finetune.progress import ignore_progress
from finetune.publishing import read_manifest, sha256_file
from finetune.registry.descent import ancestry, with_descendants
from finetune.registry.models import RegisteredVersion
from finetune.registry.promotion import champion, promote
from finetune.registry.store import get_version, list_versions, register_adapter
from finetune.search.continual.comparison import ContinualResult, ContinualSpec
from lora_assets.assets import continual, dataset, evaluation, training
from lora_assets.assets.common import key
from lora_assets.cli.app import app
from lora_assets.continual import of_settings, propose
from lora_assets.freshness import date_states, read_value
from lora_assets.laboratory import bench_of
from lora_assets.partitions import dataset_dates
from lora_assets.settings import Settings
from resources.artifact_store import ArtifactStore, ValueStore
from resources.base_model import BaseModelSource
from resources.peft_trainer import PeftTrainer
from resources.run_log import RunLog
from tests.lora_assets.traces import traced

OLD, NEW = "2026-06-01", "2026-06-02"
# One question, whose answer is another one in new data: who learns it forgets the old answer.
ANSWERS = {OLD: ("flower", "It is red."), NEW: ("stone", "It is blue.")}
PLAN: dict[str, Any] = {
    "init_from": "champion",
    "learning_rate": 5e-3,
    "max_length": 64,
    "micro_batch": 4,
    "accumulation": 1,
}
VALUES: dict[str, Any] = {**PLAN, "train_epochs": 4, "eval_fraction": 0.4}
ASSETS = [
    dataset.merged_dataset,
    dataset.dataset_profile,
    training.training_plan,
    training.adapter,
    evaluation.eval_report,
    evaluation.registered_adapter,
    continual.continual_report,
]
WHOLE = (
    "merged_dataset",
    "dataset_profile",
    "training_plan",
    "adapter",
    "eval_report",
    "registered_adapter",
    "promoted_adapter",
)


class Loop:
    """A data root on which dates are made by the assets themselves."""

    def __init__(self, root: Path, tiny_model: BaseModelRef) -> None:
        self.settings = Settings(data_root=root, base_model_name=str(tiny_model.path), **VALUES)
        self.run_log = RunLog(data_dir=str(root))
        exports = self.settings.layout.exports
        exports.mkdir(parents=True)
        for date, (thing, answer) in ANSWERS.items():
            records = [{"instruction": f"Name the colour of {thing} {i}.", "output": answer} for i in range(30)]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (exports / f"brain_dataset_{date}.jsonl").write_text(lines)

    def make(self, date: str, *names: str, **config: Any) -> dict[str, dict[str, Any]]:
        """Materialize these assets; keyword arguments are the configuration of the first. Returns their metadata."""
        layout = self.settings.layout
        ops = {names[0]: config} if config else {}
        # Defaults were read when the modules were imported.
        if "merged_dataset" in names:
            ops["merged_dataset"] = {"eval_fraction": VALUES["eval_fraction"]}
        if "training_plan" in names:
            ops["training_plan"] = {**PLAN, "epochs": VALUES["train_epochs"], **config}
        with dg.DagsterInstance.ephemeral() as instance:
            instance.add_dynamic_partitions(str(dataset_dates.name), list(ANSWERS))
            result = dg.materialize(
                ASSETS,
                selection=[key(name) for name in names],
                partition_key=date,
                instance=instance,
                resources={
                    "io_manager": ValueStore(directory=str(layout.asset_values)),
                    "base_model": BaseModelSource(
                        name=self.settings.base_model_name, cache_dir=str(layout.base_models)
                    ),
                    "store": ArtifactStore(data_root=str(layout.root), pipeline="brain"),
                    "run_log": self.run_log,
                    "trainer": PeftTrainer(),
                },
                run_config={"ops": {f"brain__{name}": {"config": values} for name, values in ops.items()}},
            )
        made = result.get_asset_materialization_events()
        events = [event.step_materialization_data.materialization for event in made]
        return {
            event.asset_key.path[-1]: {name: value.value for name, value in event.metadata.items()} for event in events
        }

    def plan(self, date: str) -> TrainingPlan:
        """The date's plan as it was made last."""
        plan = read_value(self.settings, "training_plan", date, TrainingPlan)
        assert plan is not None
        return plan


@pytest.fixture(scope="module")
def loop(tiny_model: BaseModelRef) -> Iterator[Loop]:
    """The first date trained from the base model, the second from the first one's champion."""
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short, pytest.MonkeyPatch.context() as patch:
        made = Loop(Path(short), tiny_model)
        for module in (dataset, training, evaluation, continual):
            patch.setattr(module, "SETTINGS", made.settings)
        for date in ANSWERS:
            made.make(date, *WHOLE)
        yield made
        made.run_log.close()


@pytest.fixture(scope="module")
def compared(loop: Loop) -> dict[str, Any]:
    """The metadata of the report on the second date."""
    return loop.make(NEW, "continual_report", goal="what it costs", version="v1")["continual_report"]


def report_of(compared: dict[str, Any]) -> ContinualResult:
    return ContinualResult.model_validate_json((Path(compared["path"]) / "report.json").read_bytes())


def test_the_first_date_starts_from_the_base_model_and_says_why(loop: Loop) -> None:
    plan = loop.plan(OLD)
    assert plan.continued is None
    told = "starts from the base model: no version that was trained on an earlier date has reigned yet"
    assert plan.explanations[-1] == told


def test_a_later_date_goes_on_from_the_champion_on_what_is_new_and_a_replay(loop: Loop) -> None:
    plan, prepared = loop.plan(NEW), read_value(loop.settings, "merged_dataset", NEW, PreparedDataset)
    first = get_version(loop.settings.layout.registry, "v1")
    assert prepared is not None
    assert plan.continued is not None
    assert plan.continued.adapter_hash == first.adapter_hash
    assert plan.trial_config.lora_rank == first.lineage["plan"]["lora_rank"]
    records = [json.loads(line) for line in plan.continued.dataset.train_path.read_text().splitlines()]
    blue = sum(record["output"] == ANSWERS[NEW][1] for record in records)
    assert (blue, len(records) - blue) == (plan.continued.new_records, plan.continued.replayed_records)
    assert plan.continued.replayed_records == round(blue / 3), "a quarter of the whole"
    assert plan.explanations[-1].startswith(
        f"starts from v1 ({first.run_id}), with its method and size: {blue} records"
    )

    second = get_version(loop.settings.layout.registry, "v2")
    manifest = read_manifest(loop.settings.layout.adapter(second.run_id), kind="adapter")
    assert manifest.inputs["init_adapter"] == {"run_id": first.run_id, "adapter_hash": first.adapter_hash}
    assert manifest.inputs["dataset"] == plan.continued.dataset.fingerprint
    assert second.lineage["dataset_fingerprint"] == prepared.fingerprint
    assert second.lineage["continued"]["version"] == "v1"
    card = (second.stored_path / "README.md").read_text()
    assert f"to which {blue} of the records were new; the others were replayed" in card


def test_a_date_that_is_made_again_is_the_same_whoever_reigns_meanwhile(loop: Loop) -> None:
    registry = loop.settings.layout.registry
    reigning = champion(registry)
    assert reigning is not None
    assert reigning.version == "v2", "otherwise it could not be taken for the start"
    again = loop.make(NEW, "training_plan", "adapter")
    assert (again["training_plan"]["starts_from"], again["adapter"]["reused"]) == ("v1", True)

    # Another version of the first date comes to reign, as if its training had just ended.
    before = loop.plan(NEW)
    rival = other_version(loop)
    promote(registry, rival.version, reason="for a test", by="test")
    again = loop.make(NEW, "training_plan", "adapter")
    assert loop.plan(NEW) == before
    assert again["adapter"]["reused"]
    files = discover_exports(loop.settings.exports)
    assert [state.state for state in date_states(loop.settings, files)] == ["current", "current"]
    # Asked otherwise, it is decided anew; and a person may name the version.
    assert loop.make(NEW, "training_plan", replay_fraction=0.1)["training_plan"]["starts_from"] == rival.version
    assert loop.make(NEW, "training_plan", init_from="v1")["training_plan"]["starts_from"] == "v1"
    assert loop.make(NEW, "training_plan", init_from="base")["training_plan"]["starts_from"] == "the base model"
    promote(registry, "v2", reason="after the test", by="test")
    loop.make(NEW, "training_plan")


def other_version(loop: Loop) -> RegisteredVersion:
    """A version of the first date with other weights."""
    from safetensors.numpy import load_file, save_file

    first = get_version(loop.settings.layout.registry, "v1")
    with tempfile.TemporaryDirectory() as directory:
        adapter = Path(directory) / "adapter"
        adapter.mkdir()
        shutil.copyfile(first.stored_path / "adapter_config.json", adapter / "adapter_config.json")
        weights = load_file(first.stored_path / "adapter_model.safetensors")
        save_file({name: tensor * 0.99 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
        return register_adapter(
            loop.settings.layout.registry,
            adapter_path=adapter,
            adapter_hash=adapter_hash(adapter),
            trial_id="t",
            run_id="other",
            metrics={},
            tags={},
            lineage=first.lineage,
        )


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"lora_rank": 2}, "cannot be continued: r is 16 there, 2 here"),
        ({"method": "prefix"}, "cannot be continued: peft_type is 'LORA' there, 'PREFIX_TUNING' here"),
    ],
)
def test_a_champion_that_cannot_be_continued_is_told_of_and_the_date_starts_from_the_base_model(
    loop: Loop, config: dict[str, Any], why: str
) -> None:
    loop.make(NEW, "training_plan", **config)
    plan = loop.plan(NEW)
    loop.make(NEW, "training_plan")
    assert plan.continued is None
    assert plan.explanations[-1].startswith("starts from the base model: v")
    assert why in plan.explanations[-1]


def test_what_must_not_be_learned_is_not_gone_on_with(loop: Loop, tmp_path: Path) -> None:
    """A version that went on from another one knows what that has learned."""
    versions = list_versions(loop.settings.layout.registry)
    assert with_descendants(["v1"], versions)[:2] == ["v1", "v2"]
    assert [each.version for each in ancestry(loop.settings.layout.registry, versions[1])] == ["v2", "v1"]
    listed = tmp_path / "deletions.txt"
    learned = read_value(loop.settings, "merged_dataset", OLD, PreparedDataset)
    assert learned is not None
    record = json.loads(learned.train_path.read_text().splitlines()[0])
    listed.write_text(f"content:{content_hash(record)}\n")
    settings = loop.settings.model_copy(update={"deletion_list": listed})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SETTINGS", settings)
        told = loop.make(NEW, "training_plan", replay_fraction=0.2)["training_plan"]["why"]
        assert "starts from the base model: " in told
        assert "learned what is on the deletion list" in told
        with pytest.raises(dg.Failure, match="v2 cannot be continued: v2 learned what is on the deletion list"):
            loop.make(NEW, "training_plan", init_from="v2")
        listed.write_text(f"content:{'0' * 32}\n")
        told = loop.make(NEW, "training_plan", replay_fraction=0.15, init_from="v1")["training_plan"]
        assert told["starts_from"] == "v1"
    loop.make(NEW, "training_plan")


def test_a_version_that_somebody_names_and_that_cannot_be_continued_is_an_error(loop: Loop) -> None:
    with pytest.raises(dg.Failure, match="v1 cannot be continued: no training record of 2026-06-01 is new"):
        loop.make(OLD, "training_plan", init_from="v1")
    with pytest.raises(dg.Failure, match="the registry has no version newest"):
        loop.make(OLD, "training_plan", init_from="newest")


def test_without_replay_the_old_is_forgotten_and_with_it_less(compared: dict[str, Any]) -> None:
    result = report_of(compared)
    without = result.change("continued without replay", "champion", "old")
    replay = result.change("continued", "continued without replay", "old")
    learned = result.change("continued", "champion", "new")
    assert without is not None
    assert replay is not None
    assert learned is not None
    assert result.forgetting is not None
    assert without.ci95[0] > 0, "the data conflict, so that going on without replay must forget"
    assert replay.ci95[1] < 0
    assert result.forgetting.change < without.change
    assert learned.ci95[1] < 0
    assert f"Replay lowers the loss on old data ({replay.change:+.4f} nats per token" in result.conclusion


def test_the_report_tells_each_figure_and_where_it_comes_from(compared: dict[str, Any], loop: Loop) -> None:
    result, directory = report_of(compared), Path(compared["path"])
    manifest = traced(directory, loop.settings.layout)
    assert [entry.run_id for entry in manifest.trainings] == [arm.run_id for arm in result.arms if arm.run_id]
    assert len(manifest.figures) == 2 * (len(result.arms) + len(result.changes) // 2) + 2
    names = ["base model", "champion", "continued", "continued without replay", "from scratch"]
    assert [arm.name for arm in result.arms] == names
    page = (directory / "report.html").read_text()
    read_manifest(directory, kind="continual", verify="hashes")
    for arm in result.arms:
        assert arm.report_path is not None
        assert arm.report_sha256 == sha256_file(arm.report_path / "report.json")
        for part in ("old", "new"):
            assert f"{arm.loss[part]:.4f}" in page
        if arm.run_id:
            assert arm.run_id in page
            assert arm.adapter_hash
            date = OLD if arm.name == "champion" else NEW
            assert loop.settings.layout.prepared(date, str(arm.dataset_fingerprint)).is_dir()
    whole = read_value(loop.settings, "merged_dataset", NEW, PreparedDataset)
    assert whole is not None
    assert result.old_records + result.new_records == whole.counts.eval
    for change in result.changes:
        assert (result.arm(change.arm) or result.arms[0]).run_id == change.run_ids[0]
    continued, scratch = result.arm("continued"), result.arm("from scratch")
    assert continued is not None
    assert scratch is not None
    assert (continued.tokens or 0) < (scratch.tokens or 0)
    assert result.conclusion == compared["conclusion"]
    assert f"It took {(continued.tokens or 0) / (scratch.tokens or 1):.0%} of the training tokens" in result.conclusion
    assert str(compared["losses"]).startswith("![](data:image/png;base64,")
    assert len(compared["models"].records) == 5


def test_both_trainings_are_those_of_the_date_and_nothing_is_trained_twice(
    compared: dict[str, Any], loop: Loop
) -> None:
    result = report_of(compared)
    runs = {arm.name: arm.run_id for arm in result.arms}
    assert runs["continued"] == get_version(loop.settings.layout.registry, "v2").run_id
    ordinary = loop.make(NEW, "training_plan", "adapter", init_from="base")["adapter"]
    assert (ordinary["run_id"], ordinary["reused"]) == (runs["from scratch"], True)
    loop.make(NEW, "training_plan", "adapter")
    before = {row.training_run_id for row in loop.run_log.recent()}
    shutil.rmtree(compared["path"])
    again = loop.make(NEW, "continual_report", goal="what it costs", version="v1")["continual_report"]
    assert report_of(again).changes == result.changes
    assert {row.training_run_id for row in loop.run_log.recent()} == before
    assert loop.make(NEW, "continual_report", goal="what it costs", version="v1")["continual_report"]["reused"]


def test_a_dry_run_plans_and_prices_and_trains_nothing(loop: Loop) -> None:
    told = loop.make(NEW, "continual_report", dry_run=True, replay_fraction=0.5)["continual_report"]
    assert told["status"] == "dry_run"
    assert [row.data["model"] for row in told["models"].records] == [
        "continued",
        "continued without replay",
        "from scratch",
    ]
    assert "path" not in told


def test_the_command_finds_the_same_report(
    compared: dict[str, Any], loop: Loop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(loop.settings.data_root))
    monkeypatch.setenv("BASE_MODEL_NAME", str(loop.settings.base_model_name))
    for name, value in VALUES.items():
        monkeypatch.setenv(name.upper(), str(value))
    spec = tmp_path / "continual.yaml"
    spec.write_text(f"goal: what it costs\ndataset_date: {NEW}\nversion: v1\n")
    shown = CliRunner().invoke(app, ["experiment", "continual", str(spec)])
    assert shown.exit_code == 0, shown.output
    assert compared["path"] in shown.output.replace("\n", "")
    told = CliRunner().invoke(app, ["experiment", "continual", str(spec), "--json"])
    assert json.loads(told.stdout)["reused"]
    spec.write_text("dataset_path: train.jsonl\n")
    refused = CliRunner().invoke(app, ["experiment", "continual", str(spec)])
    assert refused.exit_code != 0
    assert "name a dataset_date, not a dataset_path" in refused.output.replace("\n", " ")


def test_the_train_command_goes_on_from_a_version_with_its_method_and_size(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, prepared = get_version(loop.settings.layout.registry, "v1"), loop.plan(NEW).continued
    assert prepared is not None
    monkeypatch.setenv("TRAIN_EPOCHS", "0.2")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    arguments = ["train", "--base-model", str(loop.settings.base_model_name), "--init-from", str(first.stored_path)]
    arguments += ["--dataset", str(prepared.dataset.train_path), "--output", str(tmp_path / "a"), "--json"]
    proposed = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert proposed.exit_code == 0, proposed.output
    plan = json.loads(proposed.stdout)["plan"]["trial_config"]
    assert (plan["method"], plan["lora_rank"]) == ("lora", first.lineage["plan"]["lora_rank"])
    assert not (tmp_path / "a").exists()
    trained = CliRunner().invoke(app, arguments)
    assert trained.exit_code == 0, trained.output
    told = read_manifest(tmp_path / "a", kind="adapter").inputs["init_adapter"]
    assert told == {"run_id": first.run_id, "adapter_hash": first.adapter_hash}

    refused = CliRunner().invoke(app, [*arguments, "--method", "prefix", "--dry-run"])
    assert refused.exit_code == 1
    assert "peft_type is 'LORA' there, 'PREFIX_TUNING' here" in refused.output.replace("\n", " ")
    elsewhere = CliRunner().invoke(app, [*arguments[:3], "--init-from", str(tmp_path / "none"), *arguments[5:]])
    assert elsewhere.exit_code == 1
    assert "no adapter here" in elsewhere.output


def test_a_date_without_an_earlier_champion_has_nothing_to_compare(loop: Loop) -> None:
    with pytest.raises(dg.Failure, match="no version that was trained on a date before 2026-06-01"):
        loop.make(OLD, "continual_report")


def test_where_nothing_old_is_held_out_nothing_is_trained(loop: Loop) -> None:
    layout = loop.settings.layout
    alone = PrepareParameters(window="date", eval_fraction=VALUES["eval_fraction"])
    dataset = prepare_dataset(discover_exports(layout.exports), date=NEW, layout=layout, parameters=alone)
    base = BaseModelSource(name=loop.settings.base_model_name, cache_dir=str(layout.base_models)).resolve(
        ignore_progress
    )
    profile = profile_dataset(dataset, encoder=RecordEncoder.load(base.path))
    spec = of_settings(ContinualSpec(version="v1"), loop.settings)
    with pytest.raises(DatasetError, match=f"none of the {dataset.counts.eval} held-out records is old"):
        propose(loop.settings, spec, bench_of(loop.settings, dataset, profile, base))


def test_settings_that_start_from_the_base_model_leave_dates_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, champions = Settings(), Settings(init_from="champion")
    assert Settings(replay_fraction=0.5).recipe == plain.recipe
    assert champions.recipe != plain.recipe
    assert Settings(init_from="champion", replay_fraction=0.5).recipe != champions.recipe
    with pytest.raises(ValueError, match="INIT_FROM=champion needs TRAINING_BACKEND=hf-peft"):
        Settings(init_from="champion", training_backend="h2o", h2o_api_url="http://h2o")
