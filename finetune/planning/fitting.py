"""Making a configuration fit the memory that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import ConfigurationError
from finetune.planning.history import Measurement, memory_correction
from finetune.planning.memory import estimate_memory
from finetune.planning.model_config import ModelShape
from finetune.planning.models import MemoryEstimate, TrialConfig
from finetune.planning.rules import Device

_SHORTEST = 128


@dataclass
class Choices:
    """Values of a `TrialConfig` as they are settled, and why; those `given` are kept."""

    given: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    explanations: list[str] = field(default_factory=list)

    def settle(self, name: str, value: Any, reason: str) -> Any:
        """Take the value that is given, else this one."""
        if name in self.given:
            value, reason = self.given[name], "given"
        self.values[name] = value
        self.explanations.append(f"{name} {_shown(value)}: {reason}")
        return value

    def change(self, name: str, value: Any, reason: str) -> None:
        """Replace a value that was not given."""
        self.values[name] = value
        self.explanations.append(f"{name} now {_shown(value)}: {reason}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(value) if isinstance(value, list) else str(value)


def fit(
    shape: ModelShape,
    choices: Choices,
    limit_gb: float | None,
    device: Device,
    history: Sequence[Measurement] = (),
) -> tuple[TrialConfig, MemoryEstimate]:
    """Save memory in the order micro-batch, checkpointing, qlora, length, until the estimate fits.

    The order is that of what it costs: nothing, a third more time (Chen et al. 2016), 4-bit arithmetic (QLoRA,
    Dettmers et al. 2023), and at last data.

    Raises:
        ConfigurationError: nothing fits; with the numbers.
    """

    def current() -> tuple[TrialConfig, MemoryEstimate]:
        trial = TrialConfig.model_validate(choices.values)
        correction, _ = memory_correction(history, trial.method)
        return trial, estimate_memory(shape, trial, device=device, limit_gb=limit_gb, correction=correction)

    trial, estimate = current()
    for saving in (_halve_micro_batch, _checkpoint, _quantize, _halve_length):
        while estimate.fits is False and saving(choices, trial, f"{estimate.vram_gb:.2f} of {limit_gb} GB"):
            trial, estimate = current()
    correction, runs = memory_correction(history, trial.method)
    if runs:
        choices.explanations.append(
            f"memory times {correction:.2f}: median of the last {runs} trainings by {trial.method}"
        )
    if estimate.fits is False:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in estimate.parts.items())
        raise ConfigurationError(
            f"the training needs about {estimate.vram_gb:.2f} GB and {limit_gb} GB are there ({parts})",
            where="vram_limit_gb",
            remedy="Choose a smaller base model or a larger GPU, or give up a value that was fixed",
        )
    return trial, estimate


def _halve_micro_batch(choices: Choices, trial: TrialConfig, needed: str) -> bool:
    if "micro_batch" in choices.given or trial.micro_batch == 1:
        return False
    choices.change("micro_batch", trial.micro_batch // 2, f"before, the estimate was {needed}")
    if "accumulation" not in choices.given:
        choices.change("accumulation", trial.accumulation * 2, "the effective batch stays")
    return True


def _checkpoint(choices: Choices, trial: TrialConfig, needed: str) -> bool:
    if "gradient_checkpointing" in choices.given or trial.gradient_checkpointing or trial.method == "prefix":
        return False
    choices.change("gradient_checkpointing", True, f"before, the estimate was {needed}")
    return True


def _quantize(choices: Choices, trial: TrialConfig, needed: str) -> bool:
    if "method" in choices.given or trial.method != "lora" or trial.use_pissa:
        return False
    choices.change("method", "qlora", f"before, the estimate was {needed}")
    return True


def _halve_length(choices: Choices, trial: TrialConfig, needed: str) -> bool:
    if "max_length" in choices.given or trial.max_length <= _SHORTEST:
        return False
    choices.change("max_length", max(_SHORTEST, trial.max_length // 2), f"before, the estimate was {needed}")
    return True
