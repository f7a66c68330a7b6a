"""What the run log keeps of a training, whoever started it."""

from __future__ import annotations

from typing import Any

from finetune.planning.history import Measurement
from finetune.training.models import TrainingRequest, TrainingResult
from resources.run_log import RunLog

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


def settle(run_log: RunLog, request: TrainingRequest, result: TrainingResult, root: str | None) -> None:
    """Complete the rows of attempts that were killed between the adapter's publication and their last word.

    Args:
        run_log: has the rows.
        request: of the training.
        result: as published.
        root: the Dagster run, or the experiment, whose attempts these were.
    """
    measurement = measurement_of(request, result)
    settled = run_log.settle(
        run_id=request.run_id,
        adapter_path=request.adapter_dir,
        metrics=logged_figures(result),
        dagster_root_run_id=root,
    )
    for row_id in settled:
        if measurement:
            run_log.measured(row_id, measurement)


def measurement_of(request: TrainingRequest, result: TrainingResult) -> Measurement | None:
    """What the training took, for the next plan; nothing is known of trainings that run elsewhere."""
    if result.device is None:
        return None
    trial, memory = request.plan.trial_config, request.plan.memory_estimate
    # Neither a pass that was made smaller, since memory ran out, nor a part of the weights is what was estimated.
    shared = request.sharding == "fsdp" and result.processes > 1
    as_planned = result.micro_batch == trial.micro_batch and not shared
    return Measurement(
        method=trial.method,
        device=result.device,
        estimated_memory_gb=memory.vram_gb / memory.correction if as_planned else None,
        peak_memory_gb=result.peak_memory_gb,
        # Plans count the hours of one device.
        tokens_per_second=result.tokens_per_second and result.tokens_per_second / result.processes,
    )
