"""What an experiment hands back: its state, the paths of what it made, a log to read, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.reproduction.models import Figure
from finetune.search.adoption import configuration_hash
from finetune.search.ledger import best_trial, budget_of
from finetune.search.models import StepResult, StopReason, TrialRecord
from finetune.search.space import plain
from finetune.search.spec import ExperimentSpec


def experiment_result(
    name: str,
    spec: ExperimentSpec,
    history: Sequence[TrialRecord],
    *,
    ended: StopReason | None,
    merged_path: Path | None = None,
) -> StepResult:
    """The experiment as it stands.

    Args:
        name: the experiment's.
        spec: as it was run last.
        history: all trials.
        ended: why it is over, or None while it is not.
        merged_path: the merged model, where one was made.
    """
    best = best_trial(history)
    found = best.trial_config if best else None
    budget = budget_of(history, spec.budget_gpu_hours)
    artifact = merged_path or (best.adapter_path if best else None)
    return StepResult(
        data={
            "name": name,
            "experiment": spec.model_dump(mode="json"),
            "trial_history": [trial.model_dump(mode="json") for trial in history],
            "best_trial": best.model_dump(mode="json") if best else None,
            "budget": {**budget.model_dump(), "remaining": budget.remaining},
            "stopped_by": ended,
        },
        artifacts=[str(artifact)] if artifact else [],
        output_text="\n".join([*map(_line, history), _conclusion(spec, best, ended)]),
        metadata={
            "total_trials": len(history),
            "best_trial_id": found.trial_id if found else None,
            "gpu_hours_used": budget.used,
            "merged_path": str(merged_path) if merged_path else None,
            "adopt_trial": configuration_hash(found) if found else None,
        },
    )


def figures_of(history: Sequence[TrialRecord], spec: ExperimentSpec) -> dict[str, Figure]:
    """The report's figures by name, such as ``trial.3.eval_loss``, each with the trainings it was computed from.

    Args:
        history: trials that trained have a `run_id`, also those that were stopped.
        spec: the experiment's.
    """
    trained = [trial for trial in history if trial.run_id and trial.state != "running"]
    figures = {}
    for trial in trained:
        name = f"trial.{trial.number}"
        if trial.value is not None:
            figures[f"{name}.{spec.stop_metric}"] = Figure(value=trial.value, runs=[trial.run_id])
        figures[f"{name}.seconds"] = Figure(value=3600 * trial.gpu_hours, runs=[trial.run_id])
        for ninths, loss in trial.intermediate.items():
            figures[f"{name}.loss after {ninths} ninths"] = Figure(value=loss, runs=[trial.run_id])
    if best := best_trial(history):
        figures[f"best.{spec.stop_metric}"] = Figure(value=best.value, runs=[best.run_id])
    used = budget_of(history, spec.budget_gpu_hours).used
    figures["gpu_hours_used"] = Figure(value=used, runs=list(dict.fromkeys(trial.run_id for trial in trained)))
    return figures


def shown(trial: TrialRecord) -> str:
    """A trial's values in a line."""
    values = plain(trial.params)
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def _line(trial: TrialRecord) -> str:
    outcome = f"{trial.value:.4f}" if trial.value is not None else trial.reason
    again = f", started {trial.attempts} times" if trial.attempts > 1 else ""
    return f"trial {trial.number} {trial.state} {outcome} ({3600 * trial.gpu_hours:.1f} s{again}): {shown(trial)}"


def _conclusion(spec: ExperimentSpec, best: TrialRecord | None, ended: StopReason | None) -> str:
    found = (
        "no trial was completed"
        if best is None
        else f"best is trial {best.number}: {spec.stop_metric} {best.value:.4f}"
    )
    return f"{found}; {f'ended by {ended}' if ended else 'not ended'}"
