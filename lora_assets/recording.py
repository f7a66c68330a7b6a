"""What the run log keeps of a training, whoever started it."""

from __future__ import annotations

from typing import Any

from finetune.planning.history import Measurement
from finetune.training.models import TrainingRequest, TrainingResult

LOGGED = {
    "final_loss",
    "training_steps",
    "gpu_hours",
    "tokens_seen",
    "tokens_per_second",
    "peak_memory_gb",
    "micro_batch",
    "out_of_memory",
}


def logged_figures(result: TrainingResult) -> dict[str, Any]:
    """The figures of its row."""
    return result.model_dump(mode="json", include=LOGGED, exclude_none=True)


def measurement_of(request: TrainingRequest, result: TrainingResult) -> Measurement | None:
    """What the training took, for the next plan; nothing is known of trainings that run elsewhere."""
    if result.device is None:
        return None
    trial, memory = request.plan.trial_config, request.plan.memory_estimate
    # A pass that was made smaller, since memory ran out, is not the one that was estimated.
    as_planned = result.micro_batch == trial.micro_batch
    return Measurement(
        method=trial.method,
        device=result.device,
        estimated_memory_gb=memory.vram_gb / memory.correction if as_planned else None,
        peak_memory_gb=result.peak_memory_gb,
        tokens_per_second=result.tokens_per_second,
    )
