"""`hpo_study` as a run: an experiment's steps, on a real Dagster instance, with real trainings."""

import json
import tempfile
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune.base_model.models import BaseModelRef
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.dataset.prepare import prepare_dataset
from finetune.search.models import StepResult
from lora_assets.assets import search
from lora_assets.assets.common import COMMON
from lora_assets.partitions import dataset_dates
from lora_assets.settings import Settings
from resources.artifact_store import ValueStore
from resources.base_model import BaseModelSource
from resources.study import StudyStore
from tests.lora_assets.traces import traced
from tests.profiles import PROFILE

DATE = "2026-06-01"
CONFIG: dict[str, Any] = {
    "goal": "a low loss",
    "max_trials": 4,
    "seed": 1,
    "strategy": "halving",
    "workers": 2,
    "parameters": ["learning_rate", "lora_rank"],
    "fixed": {"max_steps": 9, "micro_batch": 1, "accumulation": 1, "max_length": 64},
    "tokens_per_second": 1000,
}


def study(settings: Settings, tiny_model: BaseModelRef, config: dict[str, Any]) -> dg.ExecuteInProcessResult:
    layout = settings.layout
    layout.exports.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(30)]
    (layout.exports / f"brain_dataset_{DATE}.jsonl").write_text("".join(lines))

    @dg.asset(**COMMON)
    def merged_dataset() -> PreparedDataset:
        return prepare_dataset(discover_exports(layout.exports), date=DATE, layout=layout)

    @dg.asset(**COMMON)
    def dataset_profile() -> DatasetProfile:
        return PROFILE

    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(str(dataset_dates.name), [DATE])
        return dg.materialize(
            [merged_dataset, dataset_profile, search.hpo_study],
            partition_key=DATE,
            instance=instance,
            resources={
                "io_manager": ValueStore(directory=str(layout.asset_values)),
                "base_model": BaseModelSource(name=str(tiny_model.path), cache_dir=str(settings.data_root)),
                "studies": StudyStore(data_dir=str(settings.data_root)),
            },
            run_config={"ops": {"brain__hpo_study": {"ops": {"open_study": {"config": config}}}}},
        )


def test_a_study_seats_its_workers_tells_of_every_trial_and_a_dry_run_of_none(
    tiny_model: BaseModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short:
        settings = Settings(data_root=Path(short))
        monkeypatch.setattr(search, "SETTINGS", settings)
        proposed = study(settings, tiny_model, {**CONFIG, "dry_run": True})
        (event,) = proposed.asset_materializations_for_node("brain__hpo_study")
        assert event.metadata["status"].value == "dry_run"
        assert len(event.metadata["proposed"].value.records) == 4  # type: ignore[union-attr]

        result = study(settings, tiny_model, CONFIG)
        (event,) = result.asset_materializations_for_node("brain__hpo_study")
        told = event.metadata
        assert told["total_trials"].value == 4
        assert told["stopped_by"].value == "max_trials"
        states = [record.data["state"] for record in told["trials"].value.records]  # type: ignore[union-attr]
        assert states[0] == "completed"
        assert set(states) == {"completed", "pruned"}
        assert {"history", "budget", "parallel"} <= set(told)
        assert str(told["history"].value).startswith("![](data:image/png;base64,")
        assert "</html>" in Path(str(told["report"].value)).read_text()
        manifest = traced(Path(str(told["path"].value)), settings.layout)
        assert told["run_ids"].value == ", ".join(entry.run_id for entry in manifest.trainings)
        # What was stopped early was trained on something, too.
        assert len(manifest.stopped) == states.count("pruned")
        assert {f"trial.{number}.seconds" for number in range(4)} <= set(manifest.figures)
        assert manifest.figures["gpu_hours_used"].runs == [
            manifest.figures[f"trial.{number}.seconds"].runs[0] for number in range(4)
        ]
        assert told["dataset_fingerprint"].value == manifest.inputs.datasets[0].fingerprint
        steps = {event.step_key for event in result.get_step_success_events()}
        assert {"brain__hpo_study.work_on_trials[0]", "brain__hpo_study.work_on_trials[1]"} <= steps
        value = StepResult.model_validate_json(
            (settings.layout.asset_values / "brain/hpo_study" / f"{DATE}.json").read_bytes()
        )
        assert value.metadata["total_trials"] == 4


def test_each_worker_of_a_study_asks_for_its_own_gpu() -> None:
    wanted = search.work_on_trials.tags["dagster-k8s/config"]
    assert json.loads(wanted)["container_config"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "dagster-k8s/config" not in search.open_study.tags
    assert search.work_on_trials.pool == "gpu"
