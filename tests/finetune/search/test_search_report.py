from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

from finetune.planning.models import Range, TrialConfig
from finetune.publishing import read_manifest
from finetune.reproduction.manifest import experiment_manifest
from finetune.search.models import TrialRecord
from finetune.search.plots import parameter_importances
from finetune.search.report import publish_report
from finetune.search.result import experiment_result, figures_of
from finetune.search.space import joint_space
from finetune.search.spec import ExperimentSpec
from finetune.search.suggest import suggest

BEGAN = datetime(2026, 6, 1, 6, tzinfo=UTC)
SPACE = joint_space(
    {
        "lora": {"learning_rate": Range(low=1e-5, high=1e-1, log=True), "lora_rank": Range(choices=[4, 8, 16])},
        "ia3": {"learning_rate": Range(low=1e-4, high=1e-2, log=True)},
    }
)


def history_of(count: int) -> list[TrialRecord]:
    """Trials whose result the learning rate decides, and the rank does not."""
    history: list[TrialRecord] = []
    for number in range(count):
        params = suggest(history, SPACE, "random", 1.0, 1, seed=3)
        assert params is not None
        rate = next(float(value) for name, value in params.items() if name.endswith("learning_rate"))
        pruned = number % 5 == 4
        history.append(
            TrialRecord(
                number=number,
                params=params,
                state="pruned" if pruned else "completed",
                value=None if pruned else abs(math.log10(rate) + 3) + (params["method"] == "ia3"),
                intermediate={1: 4.0} if pruned else {},
                gpu_hours=0.1,
                reason="pruned" if pruned else "",
                trial_config=TrialConfig(trial_id=f"t{number}", learning_rate=rate),
                started_at=BEGAN + timedelta(hours=number),
                finished_at=BEGAN + timedelta(hours=number + 1),
            )
        )
    return history


def test_a_report_shows_every_trial_and_every_picture_and_escapes_what_people_wrote(tmp_path: Path) -> None:
    history = history_of(24)
    failed = TrialRecord(number=24, params={}, state="failed", reason="<b>nothing fits</b> 1 GB")
    spec = ExperimentSpec(goal="<script>alert(1)</script>", methods=["lora", "ia3"], budget_gpu_hours=3.0)
    result = experiment_result("e1", spec, [*history, failed], ended="budget")
    place = tmp_path / "e1"
    manifest = experiment_manifest(
        kind="hpo_study",
        name="e1",
        configuration=spec.model_dump(mode="json"),
        seed=spec.seed,
        trainings={},
        exports=tmp_path,
        environment={},
        secrets=[],
        figures=figures_of(history, spec),
    )
    for _ in range(2):  # a later report takes the earlier one's place
        publish_report(
            place,
            name="e1",
            spec=spec,
            space=SPACE,
            history=[*history, failed],
            ended="budget",
            result=result,
            manifest=manifest,
        )
    outputs = read_manifest(place, kind="experiment", verify="hashes").outputs
    pictures = {"history.png", "budget.png", "parallel.png", "importance.png"}
    assert set(outputs) == {"report.html", "result.json", "experiment_manifest.json"} | pictures
    assert all((place / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    page = (place / "report.html").read_text()
    assert "<script>" not in page
    assert "<b>nothing fits" not in page
    assert page.count("data:image/png;base64,") == 4
    assert page.count('<tr class="') == 25
    assert f"ADOPT_TRIAL={result.metadata['adopt_trial']}" in page


def test_the_value_that_decides_is_the_most_important() -> None:
    importances = parameter_importances(history_of(60), SPACE)
    assert set(importances) == {"learning_rate", "lora_rank"}
    assert importances["learning_rate"] > 0.6
    assert parameter_importances(history_of(3), SPACE) == {}


def test_a_result_has_the_keys_of_the_contract() -> None:
    history = history_of(6)
    result = experiment_result("e1", ExperimentSpec(), history, ended=None)
    best = min((trial for trial in history if trial.value is not None), key=lambda trial: trial.value or 0.0)
    assert result.data["best_trial"]["number"] == best.number
    assert len(result.data["trial_history"]) == 6
    assert result.data["budget"]["used"] == sum(trial.gpu_hours for trial in history)
    assert set(result.metadata) >= {"total_trials", "best_trial_id", "gpu_hours_used", "merged_path"}
    assert result.output_text.splitlines()[-1].endswith("not ended")
