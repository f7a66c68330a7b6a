"""Fixed prompts that a champion must answer as expected: from the directory to the registry's decision."""

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import BaseModel

from finetune.dataset.models import PreparedDataset
from finetune.evaluation.models import EvalReport
from finetune.planning.models import TrainingPlan
from finetune.registry.models import RegisteredVersion
from finetune.training.models import TrainingResult
from lora_assets.assets import evaluation
from lora_assets.assets.common import key
from lora_assets.partitions import dataset_dates
from resources.artifact_store import ArtifactStore, ValueStore
from resources.base_model import BaseModelSource
from tests.e2e.conftest import DATES, Loop

pytestmark = pytest.mark.e2e
DATE = DATES[0]
ANYTHING = {"id": "anything", "prompt": "Hello?", "expect": {"matches": ""}, "max_new_tokens": 2}
NEVER = {"id": "never", "prompt": "Hello?", "expect": {"equals": "what it never says"}, "max_new_tokens": 2}


def given(name: str, value: BaseModel) -> dg.AssetsDefinition:
    """An upstream asset that has this value."""

    @dg.asset(key=key(name), partitions_def=dataset_dates)
    def asset() -> Any:
        return value

    return asset


def decided(store: ArtifactStore, demo: Loop, *cases: dict[str, Any]) -> tuple[EvalReport, RegisteredVersion, bool]:
    """Evaluate and register with these cases: the report, the version, and whether it is handed on to be exported."""
    suite = store.layout.root / "regressions"
    suite.mkdir(exist_ok=True)
    (suite / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(str(dataset_dates.name), [DATE])
        result = dg.materialize(
            [
                given("merged_dataset", demo.value("merged_dataset", DATE, PreparedDataset)),
                given("training_plan", demo.value("training_plan", DATE, TrainingPlan)),
                given("adapter", demo.value("adapter", DATE, TrainingResult)),
                evaluation.eval_report,
                evaluation.registered_adapter,
            ],
            instance=instance,
            partition_key=DATE,
            resources={
                "store": store,
                "io_manager": ValueStore(directory=str(store.layout.asset_values)),
                "base_model": BaseModelSource(cache_dir=str(demo.layout.base_models)),
            },
        )
    made = {event.asset_key.path[-1] for event in result.get_asset_materialization_events()}
    return (
        result.output_for_node(evaluation.eval_report.op.name),
        result.output_for_node(evaluation.registered_adapter.op.name, "registered_adapter"),
        "promoted_adapter" in made,
    )


def test_a_prompt_that_fails_keeps_the_version_a_challenger_and_says_why(
    demo: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(data_root=str(tmp_path), pipeline="brain")
    run_id = demo.value("adapter", DATE, TrainingResult).run_id
    shutil.copytree(demo.layout.adapter(run_id), store.layout.adapter(run_id))
    monkeypatch.setattr(evaluation, "SETTINGS", evaluation.SETTINGS.model_copy(update={"data_root": tmp_path}))

    report, version, exported = decided(store, demo, ANYTHING, NEVER)
    assert [case.id for case in report.failed_regressions] == ["never"]
    assert (version.status, exported) == ("challenger", False)
    assert "fails 1 of 2 regression prompts, such as never (is not 'what it never says')" in version.reason

    report, version, exported = decided(store, demo, ANYTHING)
    assert (report.regressions, report.failed_regressions) == (1, [])
    assert (version.status, exported) == ("champion", True)
