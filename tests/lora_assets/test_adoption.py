"""An experiment's best configuration becomes the next plan by one setting."""

import tempfile
from pathlib import Path

import dagster as dg
import pytest

from finetune.base_model.models import BaseModelRef
from finetune.dataset.models import Counts, DatasetProfile, PreparedDataset
from finetune.planning.models import TrainingPlan, TrialConfig
from finetune.planning.overrides import PlanOverrides
from finetune.planning.plan import make_plan
from finetune.search.adoption import keep_configuration
from lora_assets.assets import training
from lora_assets.assets.common import COMMON
from lora_assets.partitions import dataset_dates
from lora_assets.settings import Settings
from resources.artifact_store import ValueStore
from resources.base_model import BaseModelSource
from resources.run_log import RunLog
from tests.profiles import PROFILE


@dg.asset(**COMMON)
def dataset_profile() -> DatasetProfile:
    return PROFILE


@dg.asset(**COMMON)
def merged_dataset() -> PreparedDataset:
    counts = Counts(lines=24, train=20, eval=4, duplicates=0, rejected=0, blank=0)
    nothing: dict[str, int] = {}
    return PreparedDataset(
        path=Path("/nowhere"),
        date="2026-06-01",
        fingerprint="f",
        window_dates=["2026-06-01"],
        counts=counts,
        rejects_by_reason=nothing,
        rejects_by_file=nothing,
    )


def test_the_plan_is_the_adopted_configuration_to_the_last_value(
    tmp_path: Path, tiny_model: BaseModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = make_plan(
        tiny_model.path,
        PROFILE,
        task="style",
        method="lora",
        overrides=PlanOverrides(lora_rank=4, learning_rate=7e-4, lora_dropout=0.05, seed=7, max_steps=5),
    ).trial_config
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short, dg.DagsterInstance.ephemeral() as instance:
        settings = Settings(data_root=Path(short))
        monkeypatch.setattr(training, "SETTINGS", settings)
        adopted = keep_configuration(settings.layout.configurations, tried)
        instance.add_dynamic_partitions(str(dataset_dates.name), ["2026-06-01"])
        result = dg.materialize(
            [merged_dataset, dataset_profile, training.training_plan],
            partition_key="2026-06-01",
            instance=instance,
            resources={
                "io_manager": ValueStore(directory=str(tmp_path)),
                "base_model": BaseModelSource(name=str(tiny_model.path), cache_dir=short),
                "run_log": RunLog(data_dir=short),
            },
            run_config={"ops": {"brain__training_plan": {"config": {"adopt_trial": adopted, "lora_rank": 32}}}},
        )
        plan: TrainingPlan = result.output_for_node("brain__training_plan")
    # Equal configurations are one training: its adapter is taken as it is.
    assert plan.trial_config == tried
    (event,) = result.asset_materializations_for_node("brain__training_plan")
    assert event.metadata["adopted"].value == adopted


def test_an_adopted_configuration_makes_dates_stale_and_none_leaves_them_as_they_are() -> None:
    adopted = keep_hash()
    assert Settings().recipe == Settings(adopt_trial=None).recipe
    assert Settings(adopt_trial=adopted).recipe != Settings().recipe


def keep_hash() -> str:
    with tempfile.TemporaryDirectory() as directory:
        return keep_configuration(Path(directory), TrialConfig(trial_id="t"))
