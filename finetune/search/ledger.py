"""What trials have cost, which is the best, and whether the experiment is over."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field

from finetune.search.models import Budget, StopReason, TrialRecord

_ALWAYS = datetime.min.replace(tzinfo=UTC)


class Limits(BaseModel):
    """What ends an experiment; they may be raised when it is run again.

    ``max_trials`` counts trials that have not failed, ``max_loop_iterations`` every start of a trial, also of
    one that failed or was started again. Patience counts completed trials without a better result: what was pruned
    was never measured.
    """

    model_config = ConfigDict(frozen=True)

    max_trials: int = Field(10, ge=1)
    budget_gpu_hours: float = Field(5.0, gt=0)
    stop_threshold: float | None = None
    stop_patience: int | None = Field(3, ge=1)
    max_loop_iterations: int = Field(20, ge=1)


def best_trial(history: Sequence[TrialRecord]) -> TrialRecord | None:
    """The completed trial of the lowest value; of equals the first."""
    completed = [(trial.value, trial.number, trial) for trial in history if trial.value is not None]
    return min(completed)[2] if completed else None


def budget_of(history: Sequence[TrialRecord], gpu_hours: float) -> Budget:
    """What is used, and what running trials may still take."""
    return Budget(
        gpu_hours=gpu_hours,
        used=sum(trial.gpu_hours for trial in history),
        reserved=sum(max(0.0, t.reserved_gpu_hours - t.gpu_hours) for t in history if t.state == "running"),
    )


def reason_to_stop(history: Sequence[TrialRecord], limits: Limits) -> StopReason | None:
    """Why no more trials may start, or None while one may. Threshold and patience end those that run, too."""
    values = [trial.value for trial in history if trial.value is not None]
    if values and limits.stop_threshold is not None and min(values) <= limits.stop_threshold:
        return "threshold"
    if limits.stop_patience is not None and _without_gain(history) >= limits.stop_patience:
        return "patience"
    if sum(trial.attempts for trial in history) >= limits.max_loop_iterations:
        return "max_loop_iterations"
    budget = budget_of(history, limits.budget_gpu_hours)
    if budget.used >= budget.gpu_hours:
        return "budget"
    return "max_trials" if trials_remaining(history, limits) <= 0 else None


def trials_remaining(history: Sequence[TrialRecord], limits: Limits) -> int:
    """How many trials may still start."""
    return limits.max_trials - sum(trial.state != "failed" for trial in history)


def _without_gain(history: Sequence[TrialRecord]) -> int:
    """How many trials were completed since the best one was."""
    ended = [trial for trial in history if trial.state == "completed"]
    ended.sort(key=lambda trial: (trial.finished_at or _ALWAYS, trial.number))
    best = best_trial(ended)
    return 0 if best is None else len(ended) - 1 - ended.index(best)
