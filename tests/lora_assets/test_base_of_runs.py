"""Experiments and protocols in Dagster train on the base model of the setting, and on no other."""

from typing import Any

import dagster as dg
import pytest

from finetune.dataset.models import PreparedDataset
from lora_assets.assets.continual import ContinualConfig, continual_report
from lora_assets.assets.curriculum import CurriculumConfig, curriculum_adapter
from lora_assets.assets.ensemble import EnsembleConfig, ensemble_adapter
from lora_assets.assets.search import ExperimentConfig, open_study
from resources.base_model import BaseModelSource
from resources.run_log import RunLog
from resources.study import StudyStore
from tests.profiles import PROFILE

# They are not looked at before the config is.
GIVEN: dict[str, Any] = {
    "merged_dataset": PreparedDataset.model_construct(),
    "dataset_profile": PROFILE,
    "base_model": BaseModelSource(cache_dir="nowhere"),
}
OTHER: dict[str, Any] = {"base_model": "llama3-8b"}


@pytest.mark.parametrize(
    ("asset", "config"),
    [
        (ensemble_adapter, EnsembleConfig(**OTHER)),
        (curriculum_adapter, CurriculumConfig(**OTHER)),
        (continual_report, ContinualConfig(**OTHER)),
    ],
    ids=["ensemble", "curriculum", "continual"],
)
def test_a_run_that_names_another_base_model_is_refused(asset: Any, config: dg.Config) -> None:
    with (
        dg.build_asset_context(partition_key="2026-06-01") as context,
        pytest.raises(dg.Failure, match="BASE_MODEL_NAME"),
    ):
        asset(context, config, **GIVEN, run_log=RunLog(data_dir="nowhere"))


def test_a_study_that_names_another_base_model_is_refused() -> None:
    with (
        dg.build_op_context(partition_key="2026-06-01") as context,
        pytest.raises(dg.Failure, match="BASE_MODEL_NAME"),
    ):
        list(open_study(context, ExperimentConfig(**OTHER), **GIVEN, studies=StudyStore(data_dir="nowhere")))
