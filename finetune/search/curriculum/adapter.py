"""The adapter that went through all stages of a curriculum, published under the curriculum's own name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from finetune.adapter_files import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config
from finetune.dataset.chosen import link_or_copy
from finetune.publishing import find_published, publish_directory
from finetune.search.curriculum.report import CurriculumReport, LessonOutcome
from finetune.training.attempt import KIND, LOG_NAME
from finetune.training.card import model_card
from finetune.training.models import LossPoint, TrainingRequest, TrainingResult
from finetune.training.plots import loss_curve_png


def publish_adapter(report: CurriculumReport, request: TrainingRequest, results: Sequence[TrainingResult]) -> None:
    """Publish the last stage's adapter at `report.adapter_path`, in PEFT's layout, with what is said of all stages.

    The manifest names the stages and the comparison; the training log and the loss curve are those of all stages, one
    behind the other. What is there already is left as it is.

    Args:
        report: the curriculum.
        request: of the last stage.
        results: of all stages, in their order.

    Raises:
        ArtifactError: the last stage's adapter is damaged, or something else lies there.
        StorageFullError: the disk is full.
    """
    target = report.adapter_path
    last = results[-1]
    inputs: dict[str, Any] = {
        "dataset": report.dataset_fingerprint,
        "dates": request.dataset.window_dates,
        "base_model": request.base_model.model_dump(exclude={"path"}, mode="json"),
        "stages": [_named(stage) for stage in report.stages],
        "compared_with": _named(report.shuffled),
    }
    if find_published(target, kind=KIND, inputs=inputs):
        return
    source = report.stages[-1].adapter_path
    result = last.model_copy(
        update={
            "run_id": report.name,
            "adapter_path": target,
            "training_steps": report.steps,
            "gpu_hours": sum(each.gpu_hours for each in results),
            "seconds": sum(each.seconds for each in results),
            "tokens_seen": sum(stage.tokens for stage in report.stages),
            "loss_curve": _one_behind_the_other(results),
        }
    )
    with publish_directory(target, kind=KIND) as staging:
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            link_or_copy(source / name, staging.path / name)
        card = model_card(request, result, read_adapter_config(source))
        (staging.path / "README.md").write_text(f"{card}\n{_section(report)}", encoding="utf-8")
        (staging.path / "loss_curve.png").write_bytes(loss_curve_png(result.loss_curve))
        (staging.path / LOG_NAME).write_text("".join(_log(report.stages)), encoding="utf-8")
        staging.inputs = inputs
        staging.parameters = report.specification
        staging.results = {
            **result.model_dump(mode="json", exclude={"adapter_path", "loss_curve"}),
            "verdict": report.verdict,
            "conclusion": report.conclusion,
        }


def _named(lesson: LessonOutcome) -> dict[str, Any]:
    """What a manifest says of a training: nothing that another attempt at it could change."""
    kept = {"name", "records", "replayed", "epochs", "learning_rate", "steps", "tokens", "eval_loss", "run_id"}
    return lesson.model_dump(mode="json", include={*kept, "began_with", "adapter_hash", "dataset_fingerprint"})


def _one_behind_the_other(results: Sequence[TrainingResult]) -> list[LossPoint]:
    curve: list[LossPoint] = []
    for result in results:
        before = len(curve)
        curve += [point.model_copy(update={"step": before + point.step}) for point in result.loss_curve]
    return curve


def _log(stages: Sequence[LessonOutcome]) -> list[str]:
    """The lines of all training logs, each with its stage."""
    return [
        json.dumps({"stage": stage.name, **json.loads(line)}) + "\n"
        for stage in stages
        for line in (stage.adapter_path / LOG_NAME).read_text(encoding="utf-8").splitlines()
    ]


def _section(report: CurriculumReport) -> str:
    rows = "\n".join(
        f"| {stage.name} | {stage.records} | {stage.replayed} | {stage.epochs:g} | {stage.learning_rate:g} | "
        f"{stage.steps} | {stage.eval_loss:.4f} | {stage.run_id} |"
        for stage in (*report.stages, report.shuffled)
    )
    return f"""## Curriculum

One adapter was carried through these stages; the last row is what it is compared with.

| stage | records | replayed | epochs | learning rate | steps | held-out loss | training |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

{report.conclusion}
"""
