"""What a search knows of its trials, and what an experiment hands back."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from finetune.planning.models import TrialConfig

Strategy = Literal["random", "bayesian", "bandit", "halving"]
TrialState = Literal["running", "completed", "pruned", "failed"]
StopReason = Literal["threshold", "patience", "max_loop_iterations", "budget", "max_trials"]
Value = int | float | str | bool


class TrialRecord(BaseModel):
    """One trial of an experiment, as far as it has come.

    `params` are named as in the search space; `value` is the metric that is minimised, of completed trials;
    `intermediate` maps the ninths of the training to held-out losses in nats per token.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    params: dict[str, Value]
    state: TrialState
    value: float | None = None
    intermediate: dict[int, float] = Field(default_factory=dict)
    # hours of one device that the trial has taken, and those that are kept for it while it runs
    gpu_hours: float = 0.0
    reserved_gpu_hours: float = 0.0
    # how often a worker has started it: more than once where one was killed
    attempts: int = 1
    trial_config: TrialConfig | None = None
    run_id: str = ""
    adapter_path: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    # why it was pruned or failed
    reason: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None


class Budget(BaseModel):
    """Hours of one device: all of them, those used, and those kept for trials that run."""

    model_config = ConfigDict(frozen=True)

    gpu_hours: float
    used: float
    reserved: float

    @property
    def remaining(self) -> float:
        """What a new trial may reserve; below zero where a trial took more than it had."""
        return self.gpu_hours - self.used - self.reserved


class StepResult(BaseModel):
    """What a skill returns: its data, the paths of what it made, a log to read, and the figures to show."""

    model_config = ConfigDict(frozen=True)

    data: dict[str, Any]
    artifacts: list[str]
    output_text: str
    metadata: dict[str, Any]
