"""What a curriculum came to: each stage's held-out loss, the comparison with the same data shuffled, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from finetune.base_model.models import BaseModelRef
from finetune.canvas import GOOD, LINE, PLAIN, canvas, png
from finetune.evaluation.figures import RESAMPLES
from finetune.evaluation.losses import RecordLosses
from finetune.evaluation.statistics import bootstrap_ci95
from finetune.publishing import publish_directory
from finetune.reproduction.models import ExperimentManifest
from finetune.search.curriculum.lessons import Lesson, Lessons
from finetune.search.curriculum.spec import CurriculumSpec
from finetune.search.curriculum.stage_files import FileCounts
from finetune.search.models import StepResult
from finetune.search.page import render_page, write_report

KIND = "curriculum"
CAPTIONS = {"held_out.png": "Held-out loss after each stage, and of the same data shuffled at as many steps"}
# Not even if all of fewer pairs agreed would a two-sided sign test tell at 5 %: an interval of so few is no evidence.
_FEWEST_RECORDS = 6

Verdict = Literal["better", "worse", "undecided"]


class LessonOutcome(BaseModel):
    """One training, and its adapter on the held-out records; losses in nats per trained token.

    `change` is its loss minus that of what it began with (the base model, or the stage before), with the 95 %
    confidence interval over records. All of it was computed from the losses beside `evaluation`, whose ``report.json``
    has the SHA-256 `evaluation_sha256`.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    records: int
    replayed: int
    # lowest and highest difficulty of the stage's own records
    difficulty: tuple[float, float] | None
    epochs: float
    learning_rate: float
    steps: int
    tokens: int
    gpu_hours: float
    final_loss: float | None
    eval_loss: float
    change: float
    change_ci95: tuple[float, float]
    run_id: str
    # the training whose adapter it began with
    began_with: str | None
    adapter_path: Path
    adapter_hash: str
    dataset_path: Path
    dataset_fingerprint: str
    evaluation: Path
    evaluation_sha256: str


class CurriculumReport(BaseModel):
    """All stages, the same data shuffled, and how they compare on the same held-out records.

    `difference` is the loss of the last stage minus that of the shuffled training, with its 95 % confidence interval.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    specification: dict[str, Any]
    base_model: BaseModelRef
    base_loss: float
    dataset_path: Path
    dataset_fingerprint: str
    held_out_path: Path
    held_out_sha256: str
    held_out_records: int
    stages: list[LessonOutcome]
    shuffled: LessonOutcome
    left_out: int
    files: list[FileCounts]
    difference: float
    difference_ci95: tuple[float, float]
    verdict: Verdict
    conclusion: str
    adapter_path: Path
    adapter_hash: str
    # the trainings that each figure was computed from
    figures: dict[str, list[str]]

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages, and of the shuffled training."""
        return sum(stage.steps for stage in self.stages)


def change(before: Sequence[float], after: RecordLosses, *, seed: int) -> tuple[float, tuple[float, float]]:
    """The paired difference in loss per token, and its 95 % confidence interval by the bootstrap over records.

    Args:
        before: summed losses of the same records under something else, in nats.
        after: of what it is compared with.
        seed: of the bootstrap.
    """
    differences, tokens = np.array(after.nats) - np.array(before), np.array(after.tokens, np.int64)
    return (
        float(differences.sum() / tokens.sum()),
        bootstrap_ci95(differences, tokens, resamples=RESAMPLES, seed=seed),
    )


def verdict_of(ci95: tuple[float, float], records: int) -> Verdict:
    """What the interval of curriculum minus shuffled says: undecided where it holds zero, or is of too few records."""
    low, high = ci95
    if records < _FEWEST_RECORDS:
        return "undecided"
    return "better" if high < 0 else "worse" if low > 0 else "undecided"


def conclude(stages: Sequence[LessonOutcome], shuffled: LessonOutcome, ci95: tuple[float, float], records: int) -> str:
    """The outcome in words."""
    said = {
        "better": "The curriculum is better than the same data shuffled",
        "worse": "The curriculum is worse than the same data shuffled",
        "undecided": "It is undecided whether the curriculum is better than the same data shuffled",
    }[verdict_of(ci95, records)]
    last = stages[-1]
    few = f" {records} held-out records are too few to tell." if records < _FEWEST_RECORDS else ""
    return (
        f"{said}: held-out loss {last.eval_loss:.4f} against {shuffled.eval_loss:.4f} nats per token, a difference of "
        f"{last.eval_loss - shuffled.eval_loss:+.4f} (95 % interval {ci95[0]:+.4f} to {ci95[1]:+.4f}, paired over "
        f"{records} records), after {shuffled.steps} steps each, on {sum(stage.tokens for stage in stages)} and "
        f"{shuffled.tokens} tokens.{few} One seed was trained: the interval tells of other records, not of other seeds."
    )


def priced(lesson: Lesson) -> dict[str, Any]:
    """A row of what a training will take."""
    plan, cost = lesson.plan, lesson.plan.cost
    return {
        "stage": lesson.name,
        "records": len(lesson.rows),
        "replayed": lesson.replayed,
        "difficulty": None if lesson.span is None else f"{lesson.span[0]:.4g} to {lesson.span[1]:.4g}",
        "epochs": plan.trial_config.epochs,
        "learning_rate": plan.trial_config.learning_rate,
        "steps": plan.estimated_steps,
        "tokens": plan.estimated_tokens,
        "gpu_hours": cost.gpu_hours if cost else None,
        "price": cost.price if cost else None,
    }


def dry_run_result(name: str, spec: CurriculumSpec, lessons: Lessons, files: Sequence[FileCounts]) -> StepResult:
    """All trainings priced, none of them made."""
    total = lessons.total()
    cost = total.cost
    hours = cost.gpu_hours if cost else None
    rows = [priced(lesson) for lesson in lessons.trainings]
    if lessons.measuring is not None:
        hours_of_measuring, price = lessons.measuring.gpu_hours, lessons.measuring.price
        rows.insert(
            0, dict.fromkeys(rows[0]) | {"stage": "(base_loss)", "gpu_hours": hours_of_measuring, "price": price}
        )
    told = (
        f"{hours:.3g} GPU-hours" if hours is not None else "unknown time: nothing was measured, set tokens_per_second"
    )
    expected = "; base losses are not measured yet, so tokens are expected ones" if lessons.measuring else ""
    return StepResult(
        data={
            "name": name,
            "specification": spec.model_dump(mode="json"),
            "proposed": rows,
            "left_out": lessons.left_out,
            "files": [each.model_dump(mode="json") for each in files],
        },
        artifacts=[],
        output_text=f"dry run: {len(lessons.trainings)} trainings, {told}{expected}",
        metadata={
            "status": "dry_run",
            "trainings": len(lessons.trainings),
            "estimated_steps": total.estimated_steps,
            "estimated_tokens": total.estimated_tokens,
            "estimated_gpu_hours": hours,
            "estimated_price": cost.price if cost else None,
        },
    )


def result_of(report: CurriculumReport, directory: Path) -> StepResult:
    """What is handed back of a curriculum that is done."""
    told = [
        f"stage {stage.name}: {stage.records} records ({stage.replayed} replayed), {stage.steps} steps, "
        f"held-out loss {stage.eval_loss:.4f}"
        for stage in report.stages
    ]
    return StepResult(
        data=report.model_dump(mode="json"),
        artifacts=[str(report.adapter_path), str(directory)],
        output_text="\n".join([*told, report.conclusion]),
        metadata={
            "status": "completed",
            "name": report.name,
            "verdict": report.verdict,
            "eval_loss": report.stages[-1].eval_loss,
            "shuffled_loss": report.shuffled.eval_loss,
            "base_loss": report.base_loss,
            "difference": report.difference,
            "difference_ci95": list(report.difference_ci95),
            "steps": report.steps,
            "tokens": sum(stage.tokens for stage in report.stages),
            "shuffled_tokens": report.shuffled.tokens,
            "gpu_hours": sum(each.gpu_hours for each in (*report.stages, report.shuffled)),
            "left_out": report.left_out,
            "adapter_hash": report.adapter_hash,
        },
    )


def publish_curriculum_report(directory: Path, report: CurriculumReport, manifest: ExperimentManifest) -> None:
    """Publish ``report.json``, ``report.html``, the curve and the manifest, in the place of an earlier report.

    Raises:
        StorageFullError: the disk is full.
    """
    plots = {"held_out.png": held_out_png(report)}
    page = render_page("curriculum/report.html.jinja", plots=plots, captions=CAPTIONS, report=report)
    with publish_directory(directory, kind=KIND) as staging:
        write_report(staging.path, plots=plots, page=page, result=report, manifest=manifest)
        staging.inputs = report_inputs(report)
        staging.results = {"verdict": report.verdict, "difference": report.difference}


def report_inputs(report: CurriculumReport) -> dict[str, Any]:
    """What a report was made from."""
    evaluations = {each.run_id: each.evaluation_sha256 for each in (*report.stages, report.shuffled)}
    return {"specification": report.specification, "evaluations": evaluations}


def held_out_png(report: CurriculumReport) -> bytes:
    """Held-out loss over optimizer steps: after each stage, and of the shuffled training where it ended."""
    figure, axes = canvas()
    steps = np.cumsum([0, *(stage.steps for stage in report.stages)]).tolist()
    losses = [report.base_loss, *(stage.eval_loss for stage in report.stages)]
    axes.plot(steps, losses, color=GOOD, marker="o", markersize=4, label="curriculum")
    axes.plot([0, report.shuffled.steps], [report.base_loss, report.shuffled.eval_loss], color=PLAIN, linestyle="--")
    axes.scatter([report.shuffled.steps], [report.shuffled.eval_loss], s=28, color=PLAIN, label="the same shuffled")
    axes.axhline(report.base_loss, color=LINE, linewidth=0.6)
    for stage, at, loss in zip(report.stages, steps[1:], losses[1:], strict=True):
        axes.annotate(stage.name, (at, loss), fontsize=8, ha="right", va="bottom")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(frameon=False)
    return png(figure)
