"""The table that ends `lora-assets run` and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_assets.cli.console import err, out, print_table
from lora_assets.outcome import DateOutcome, StepOutcome

# The figures of each asset's metadata that the table shows.
FIGURES = {
    "merged_dataset": ("train", "eval", "duplicates", "rejected"),
    "dataset_profile": ("avg_tokens", "max_tokens", "total_tokens"),
    "training_plan": ("trial_id", "estimated_steps", "vram_gb"),
    "adapter": ("training_steps", "final_loss", "tokens_per_second"),
    "eval_report": ("base_loss", "eval_loss", "base_exact_match", "exact_match"),
    "registered_adapter": ("version", "status"),
    "merged_model": ("merged_tensors", "max_logit_difference"),
    "gguf": ("tokenization_equal", "size"),
    "modelfile": ("created_model",),
}


def print_outcome(outcome: DateOutcome) -> None:
    """One date: its assets with time, main figures and path; then checks that failed, then the error."""
    title = f"\n{outcome.date}: {outcome.status} in {outcome.seconds:.0f} s"
    if not outcome.steps:
        out.print(title)
        return
    print_table(
        title,
        ["asset", "time", "figures", "path"],
        [[step.asset, _time(step), _figures(step), _path(step)] for step in outcome.steps],
    )
    promoted = {step.asset for step in outcome.steps} & {"promoted_adapter"}
    registered = next((step for step in outcome.steps if step.asset == "registered_adapter"), None)
    if registered and not promoted:
        out.print(f"not exported: {registered.figures['reason']}", markup=False)
    for check in outcome.failed_checks:
        err.print(f"check failed: {check}", style="yellow", markup=False)


def _time(step: StepOutcome) -> str:
    reused = " (reused)" if step.figures.get("reused") else ""
    return f"{step.seconds:.1f} s{reused}"


def _figures(step: StepOutcome) -> str:
    names = [name for name in FIGURES.get(step.asset, ()) if name in step.figures]
    return ", ".join(f"{name} {_short(step.figures[name])}" for name in names)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _path(step: StepOutcome) -> str:
    path = step.figures.get("path") or step.figures.get("stored_path")
    if not path:
        return ""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)
