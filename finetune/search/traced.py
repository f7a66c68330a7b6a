"""Every figure of a protocol's report by name, with the trainings or the combination that it was computed from."""

from __future__ import annotations

from finetune.reproduction.manifest import evaluation_of
from finetune.reproduction.models import Combination, Figure
from finetune.search.ablation.report import AblationResult
from finetune.search.continual.comparison import PARTS, ContinualResult
from finetune.search.curriculum.report import CurriculumReport
from finetune.search.ensemble.result import EnsembleResult

Figures = dict[str, Figure]


def ablation_figures(result: AblationResult) -> Figures:
    """Means, differences and p-values by configuration, and each seed's loss: ``lora_rank 4.mean``."""
    figures: Figures = {}
    base = _ended(result, 0)
    for index, arm in enumerate(result.arms):
        runs = _ended(result, index)
        if arm.mean is not None:
            figures[f"{arm.label}.mean"] = Figure(value=arm.mean, runs=runs)
        if arm.difference is not None:
            figures[f"{arm.label}.difference"] = Figure(value=arm.difference.mean, runs=[*runs, *base])
            figures[f"{arm.label}.p"] = Figure(value=arm.p_corrected, runs=[*runs, *base])
        for run in arm.runs:
            if run.loss is not None:
                figures[f"{arm.label}.seed {run.seed}"] = Figure(value=run.loss, runs=[run.run_id])
    return figures


def _ended(result: AblationResult, index: int) -> list[str]:
    return [run.run_id for run in result.arms[index].runs if run.loss is not None]


def curriculum_figures(report: CurriculumReport) -> Figures:
    """Losses and changes by stage, and the comparison with the same data shuffled: ``stage 1.eval_loss``."""
    last, rival = report.stages[-1], report.shuffled
    figures = {
        "base_loss": Figure(value=report.base_loss, runs=[last.run_id]),
        "difference": Figure(value=report.difference, runs=[last.run_id, rival.run_id]),
    }
    for lesson in (*report.stages, rival):
        before = [lesson.began_with] if lesson.began_with else []
        figures[f"{lesson.name}.eval_loss"] = Figure(value=lesson.eval_loss, runs=[lesson.run_id])
        figures[f"{lesson.name}.change"] = Figure(value=lesson.change, runs=[*before, lesson.run_id])
        if lesson.final_loss is not None:
            figures[f"{lesson.name}.final_loss"] = Figure(value=lesson.final_loss, runs=[lesson.run_id])
    return figures


def continual_figures(result: ContinualResult) -> Figures:
    """Losses by model and part, and their changes: ``continued.old``, ``continued - champion.old``."""
    figures: Figures = {}
    # The base model's losses stand in every evaluation; those shown are of the champion's.
    known = [arm.run_id for arm in result.arms if arm.name == "champion" and arm.run_id]
    for arm in result.arms:
        for part in PARTS:
            figures[f"{arm.name}.{part}"] = Figure(value=arm.loss[part], runs=[arm.run_id] if arm.run_id else known)
    for change in result.changes:
        runs = [run_id for run_id in change.run_ids if run_id]
        figures[f"{change.arm} - {change.against}.{change.part}"] = Figure(value=change.change, runs=runs)
    return figures


def ensemble_figures(result: EnsembleResult) -> Figures:
    """Losses by member and of the combination, on both halves, and how these two compare: ``seed 42.judging_loss``."""
    figures: Figures = {}
    rated = [(member.name, member.run_id, member.evaluated) for member in result.members]
    for name, run_id, evaluated in [*rated, ("combination", result.name, result.combination)]:
        if evaluated is not None:
            figures[f"{name}.selection_loss"] = Figure(value=evaluated.figures.selection_loss, runs=[run_id])
            figures[f"{name}.judging_loss"] = Figure(value=evaluated.figures.judging_loss, runs=[run_id])
    best = [run_id for name, run_id, _ in rated if name == result.best_member]
    if result.base is not None:
        figures["base.selection_loss"] = Figure(value=result.base.selection_loss, runs=best)
        figures["base.judging_loss"] = Figure(value=result.base.judging_loss, runs=best)
    if result.verdict is not None and result.verdict.delta is not None:
        figures["delta_vs_best_member"] = Figure(value=result.verdict.delta, runs=[result.name, *best])
    return figures


def combination_of(result: EnsembleResult) -> dict[str, Combination]:
    """The combination by the ensemble's name, where one was measured.

    Raises:
        ArtifactError: its evaluation is damaged.
    """
    if result.combination is None:
        return {}
    return {
        result.name: Combination(
            adapter_hash=result.combination.adapter_hash,
            path=result.adapter_path,
            members=[member.run_id for member in result.members if member.evaluated and member.weight],
            evaluations=[evaluation_of(result.combination.report_path)],
        )
    }
