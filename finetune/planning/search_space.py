"""Ranges of all hyper-parameters around a configuration, for searches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from finetune.planning.memory import estimate_memory
from finetune.planning.model_config import ModelShape
from finetune.planning.models import MemoryEstimate, Range, TrialConfig
from finetune.planning.rules import Device

Value = TypeVar("Value", bound=int | float | str | bool)


def search_space(shape: ModelShape, trial: TrialConfig, estimate: MemoryEstimate, device: Device) -> dict[str, Range]:
    """Ranges that hold the configuration itself, and nothing that the memory cannot.

    ``target_modules`` are comma-separated names, or ``all-linear``. Ranges of the literature: ranks, alphas,
    rates and dropouts as in QLoRA (Dettmers et al. 2023, appendix A.1 and table 9) and LoRA Without Regret
    (Schulman et al. 2025); the rate a decade to both sides.

    Args:
        shape: of the base model.
        trial: the plan's choice.
        estimate: of its memory, with the limit and the correction that apply.
        device: where it will run.
    """
    space = {"method": Range(choices=[trial.method])}
    if trial.method in ("lora", "qlora"):
        attention = ",".join(linear.name for linear in shape.linears if linear.source in ("attention", "heads"))
        modules = trial.target_modules if isinstance(trial.target_modules, str) else ",".join(trial.target_modules)
        space |= {
            "lora_rank": _choices([4, 8, 16, 32, 64], trial.lora_rank),
            "lora_alpha": _choices([8, 16, 32, 64, 128], trial.lora_alpha),
            "lora_dropout": Range(low=0.0, high=max(0.1, trial.lora_dropout)),
            "use_rslora": Range(choices=[False, True]),
            "use_dora": Range(choices=[False, True]),
            "target_modules": _choices(["all-linear", attention], modules),
        }
    if trial.method == "prefix":
        space["virtual_tokens"] = _choices([10, 20, 50, 100], trial.virtual_tokens)
    passes = [trial.micro_batch // 4, trial.micro_batch // 2, trial.micro_batch, trial.micro_batch * 2]
    lengths = [trial.max_length // 2, trial.max_length, trial.max_length * 2]
    return space | {
        "learning_rate": Range(low=trial.learning_rate / 10, high=trial.learning_rate * 10, log=True),
        "lr_schedule": _choices(["cosine", "linear", "constant_with_warmup"], trial.lr_schedule),
        "warmup_ratio": Range(low=0.0, high=max(0.1, trial.warmup_ratio)),
        "weight_decay": Range(low=0.0, high=max(0.1, trial.weight_decay)),
        "micro_batch": _fitting(shape, trial, estimate, device, "micro_batch", (size for size in passes if size > 0)),
        "accumulation": _choices([1, 2, 4, 8], trial.accumulation),
        "epochs": Range(low=min(1, trial.epochs), high=max(5, trial.epochs)),
        "max_length": _fitting(
            shape,
            trial,
            estimate,
            device,
            "max_length",
            (length for length in lengths if 64 <= length <= shape.max_positions),
        ),
        # Prefixes and packed records exclude each other.
        "packing": _choices([False] if trial.method == "prefix" else [False, True], trial.packing),
        "precision": _choices(["bf16", "fp32"] if device == "cuda" else ["fp32"], trial.precision),
        "seed": Range(choices=[trial.seed, trial.seed + 1, trial.seed + 2]),
    }


def _choices(usual: Iterable[Value], chosen: Value) -> Range:
    return Range(choices=list(dict.fromkeys([*usual, chosen])))


def _fitting(
    shape: ModelShape,
    trial: TrialConfig,
    estimate: MemoryEstimate,
    device: Device,
    name: str,
    values: Iterable[int],
) -> Range:
    """Those values that fit the memory with everything else as chosen; the chosen one does."""
    chosen: int = getattr(trial, name)
    fitting = [chosen]
    for value in values:
        other = estimate_memory(
            shape,
            trial.model_copy(update={name: value}),
            device=device,
            limit_gb=estimate.limit_gb,
            correction=estimate.correction,
        )
        if value != chosen and other.fits is not False:
            fitting.append(value)
    return Range(choices=sorted(fitting))
