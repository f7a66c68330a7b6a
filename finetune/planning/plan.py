"""From a profile to a training configuration that fits the machine, each choice explained.

Rules and their sources:

- LoRA on all linear layers beats attention alone (Dettmers et al. 2023, QLoRA, section 4; Schulman et al.
  2025, LoRA Without Regret).
- alpha is twice the rank: with alpha / rank held constant the best rate hardly depends on the rank
  (LoRA Without Regret).
- LoRA's rate is about ten times full fine-tuning's: 2e-4 at 7 billion parameters and 1e-4 above 13
  billion (QLoRA, table 9; TRL's default for SFT with peft). Between and below, the rate goes with
  hidden_size ** -0.78 (LoRA Without Regret, measured on Llama models).
- (IA)^3: 3e-3 (Liu et al. 2022). Prefix tuning: 1e-2, for prefixes without reparametrization (peft's
  own examples).
- Effective batch at most 32: LoRA tolerates large batches worse than full fine-tuning (LoRA Without Regret).
- Cosine schedule with 3 % of warm-up, 3 epochs, weight decay 0 (Taori et al. 2023, Stanford Alpaca).
- No dropout with LoRA (LoRA Without Regret trains without); 0.1 with QLoRA up to 13 billion parameters and
  0.05 above (QLoRA, appendix B.2).
- QLoRA's paged 8-bit AdamW where bitsandbytes has a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.dataset.models import DatasetProfile
from finetune.errors import ConfigurationError
from finetune.planning.memory import estimate_memory
from finetune.planning.model_config import ModelShape, read_model_shape
from finetune.planning.models import MemoryEstimate, Method, Range, Task, TrainingPlan, TrialConfig
from finetune.planning.overrides import PlanOverrides
from finetune.publishing import sha256_json

_RANKS: dict[Task, int] = {"instruction": 16, "chat": 16, "style": 8, "domain": 32}
# Tokens of one forward and backward pass that keep the device busy; more only takes memory.
_PASS_TOKENS = {"cpu": 4096, "cuda": 16384}
_TRUNCATED_SHARE = 0.005
_SHORTEST = 128
_FEWEST_STEPS = 250
_LARGEST_BATCH, _SMALLEST_BATCH = 16, 8

Device = Literal["cpu", "cuda"]


def trial_id_of(trial: TrialConfig) -> str:
    """A short stable name of everything in a configuration but its own name."""
    return sha256_json(trial.model_dump(exclude={"trial_id"}))[:10]


def make_plan(
    model_dir: Path,
    profile: DatasetProfile,
    *,
    task: Task = "instruction",
    method: Method = "lora",
    overrides: PlanOverrides | None = None,
    vram_limit_gb: float | None = None,
    device: Device = "cpu",
) -> TrainingPlan:
    """Choose a configuration for a model, a dataset and a machine.

    Args:
        model_dir: a directory that holds at least the model's ``config.json``.
        profile: the dataset's statistics with this model's tokenizer.
        task: what the model shall learn; decides the rank.
        method: how; a lora that does not fit may become a qlora.
        overrides: values that are kept as given.
        vram_limit_gb: memory of the device in GB (10^9 bytes), or None for no limit.
        device: where the training will run.

    Raises:
        BaseModelError: the model's configuration is missing, damaged or of an unknown family.
        ConfigurationError: the values given contradict each other, or nothing fits the memory.
    """
    shape = read_model_shape(model_dir)
    given = (overrides or PlanOverrides()).model_dump(exclude_none=True)
    choices = _choose(shape, profile, task, method, given, device)
    _refuse_contradictions(choices.values, method, device)
    trial, estimate = _fit(shape, choices, vram_limit_gb, device)
    trial = trial.model_copy(update={"trial_id": trial_id_of(trial)})
    return TrainingPlan(
        trial_config=trial,
        search_space=search_space(shape, trial),
        memory_estimate=estimate,
        explanations=choices.explanations,
        estimated_steps=_steps(profile.total_samples, trial),
        estimated_tokens=_tokens(profile, trial),
    )


def search_space(shape: ModelShape, trial: TrialConfig) -> dict[str, Range]:
    """Ranges of the hyper-parameters around a configuration, for searches.

    ``target_modules`` are comma-separated names, or ``all-linear``.
    """
    attention = ",".join(linear.name for linear in shape.linears if linear.inputs == shape.hidden)
    return {
        "lora_rank": Range(choices=[4, 8, 16, 32, 64]),
        "lora_alpha": Range(choices=[8, 16, 32, 64, 128]),
        "lora_dropout": Range(low=0.0, high=0.1),
        "use_rslora": Range(choices=[False, True]),
        "use_dora": Range(choices=[False, True]),
        "target_modules": Range(choices=["all-linear", attention]),
        "learning_rate": Range(low=trial.learning_rate / 10, high=trial.learning_rate * 10, log=True),
        "lr_schedule": Range(choices=["cosine", "linear", "constant_with_warmup"]),
        "warmup_ratio": Range(low=0.0, high=0.1),
        "weight_decay": Range(low=0.0, high=0.1),
        "accumulation": Range(choices=[1, 2, 4, 8]),
        "epochs": Range(low=1, high=5),
    }


@dataclass
class _Choices:
    """Values of a `TrialConfig` as they are settled, and why."""

    given: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    explanations: list[str] = field(default_factory=list)

    def settle(self, name: str, value: Any, reason: str) -> Any:
        if name in self.given:
            value, reason = self.given[name], "given"
        self.values[name] = value
        self.explanations.append(f"{name} {_shown(value)}: {reason}")
        return value

    def change(self, name: str, value: Any, reason: str) -> None:
        self.values[name] = value
        self.explanations.append(f"{name} now {_shown(value)}: {reason}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _choose(
    shape: ModelShape, profile: DatasetProfile, task: Task, method: Method, given: dict[str, Any], device: Device
) -> _Choices:
    choices = _Choices(given, values={"trial_id": "", "method": method, "task": task})
    settle = choices.settle
    if method in ("lora", "qlora"):
        rank = settle("lora_rank", _RANKS[task], f"for the task {task}")
        settle("lora_alpha", 2 * rank, "twice the rank keeps the scale of the update whatever the rank")
        settle("lora_dropout", *_dropout(shape, method))
        settle("target_modules", "all-linear", "adapters on all linear layers beat attention alone")
        for flag in ("use_rslora", "use_dora", "use_pissa"):
            settle(flag, False, "plain LoRA unless asked for")
    if method == "prefix":
        settle("virtual_tokens", 20, "a short prefix serves a narrow task")
    settle("learning_rate", *_learning_rate(shape, method))
    settle("lr_schedule", "cosine", "decays smoothly to zero")
    settle("warmup_ratio", 0.03, "3 % of the steps, so that the first ones do no harm")
    settle("weight_decay", 0.0, "adapters are small enough without")
    eight_bit = device == "cuda" and method == "qlora"
    settle(
        "optimizer",
        "paged_adamw_8bit" if eight_bit else "adamw_torch",
        "paged 8-bit states, as in QLoRA" if eight_bit else "plain AdamW: adapters need little state",
    )
    epochs = settle("epochs", 3.0, "usual for data sets of this kind")
    max_length = settle("max_length", *_max_length(shape, profile))
    settle("packing", False, "batches are grouped by length, so that little is padded")
    _settle_batch(choices, profile.total_samples, epochs, max_length, device)
    settle("precision", *(("bf16", "the GPU's own") if device == "cuda" else ("fp32", "exact on a CPU")))
    settle("gradient_checkpointing", False, "it costs a third more time, and memory suffices")
    settle("attention", "sdpa", "PyTorch's own fused attention")
    settle("seed", 42, "fixed, so that the run can be repeated")
    if "max_steps" in given:
        settle("max_steps", None, "")
    return choices


def _dropout(shape: ModelShape, method: Method) -> tuple[float, str]:
    if method == "lora":
        return 0.0, "it costs a fifth of the time, and LoRA hardly gains from it"
    if shape.parameters <= 14e9:
        return 0.1, "as published for QLoRA up to 13 billion parameters"
    return 0.05, "as published for QLoRA above 13 billion parameters"


def _learning_rate(shape: ModelShape, method: Method) -> tuple[float, str]:
    if method == "prefix":
        return 1e-2, "prefixes need large steps"
    if method == "ia3":
        return 3e-3, "as published for (IA)^3"
    rate = float(f"{min(max(2e-4 * (4096 / shape.hidden) ** 0.78, 1e-4), 5e-3):.2g}")
    if method == "full":
        return rate / 10, "a tenth of LoRA's"
    return rate, f"2e-4 at a hidden size of 4096, scaled to {shape.hidden}"


def _max_length(shape: ModelShape, profile: DatasetProfile) -> tuple[int, str]:
    limit = shape.max_positions
    if profile.max_tokens is None:
        return min(1024, limit), "no token statistics: a usual length"
    longest = min(max(64, math.ceil(profile.max_tokens / 64) * 64), limit)
    shares = {cut.max_length: cut.record_share for cut in profile.truncation if cut.max_length < longest}
    for length in sorted(shares):
        if shares[length] <= _TRUNCATED_SHARE:
            return length, f"truncates {shares[length]:.1%} of records"
    if longest >= profile.max_tokens:
        return longest, f"the longest record has {profile.max_tokens} tokens"
    return longest, f"the model's limit; the longest record has {profile.max_tokens} tokens"


def _settle_batch(choices: _Choices, records: int, epochs: float, max_length: int, device: Device) -> None:
    batch = _LARGEST_BATCH
    while batch > _SMALLEST_BATCH and records * epochs / batch < _FEWEST_STEPS:
        batch //= 2
    reason = f"{records} records give {math.ceil(records * epochs / batch)} steps of {batch} records"
    given = choices.given
    if "accumulation" in given and "micro_batch" not in given:
        micro = max(1, batch // given["accumulation"])
    else:
        micro = min(batch, 1 << max(0, (_PASS_TOKENS[device] // max_length).bit_length() - 1))
    micro = choices.settle("micro_batch", micro, f"{reason}; {micro} at a time fill a pass of {max_length} tokens each")
    choices.settle("accumulation", max(1, batch // micro), f"towards an effective batch of {batch}, well under 32")


def _refuse_contradictions(values: dict[str, Any], method: Method, device: Device) -> None:
    def refuse(what: str, where: str, remedy: str) -> None:
        raise ConfigurationError(what, where=where, remedy=remedy)

    if method == "prefix" and values["gradient_checkpointing"]:
        refuse("prefix tuning does not work with gradient checkpointing", "gradient_checkpointing", "Turn it off")
    if method == "prefix" and values["packing"]:
        refuse("prefix tuning does not work with packed records", "packing", "Turn it off")
    if method == "qlora" and values.get("use_pissa"):
        refuse(
            "PiSSA starts from the base model's own singular vectors, which 4-bit weights no longer have",
            "use_pissa",
            "Use method lora with PiSSA, or qlora without",
        )
    if values.get("use_pissa") and (values.get("use_rslora") or values.get("use_dora")):
        refuse("PiSSA cannot be turned into a plain adapter together with rsLoRA or DoRA", "use_pissa", "Choose one")
    if device == "cpu" and values["attention"] == "flash_attention_2":
        refuse("flash attention needs a GPU, and none is planned for", "attention", "Use sdpa")
    if device == "cpu" and values["optimizer"].startswith("paged_"):
        refuse(
            f"the optimizer {values['optimizer']} needs a GPU, and none is planned for", "optimizer", "Use adamw_torch"
        )


def _fit(
    shape: ModelShape, choices: _Choices, limit_gb: float | None, device: Device
) -> tuple[TrialConfig, MemoryEstimate]:
    """Save memory in the order micro-batch, checkpointing, qlora, length, until the estimate fits."""

    def current() -> tuple[TrialConfig, MemoryEstimate]:
        trial = TrialConfig.model_validate(choices.values)
        return trial, estimate_memory(shape, trial, device=device, limit_gb=limit_gb)

    trial, estimate = current()
    for saving in (_halve_micro_batch, _checkpoint, _quantize, _halve_length):
        while estimate.fits is False and saving(choices, trial, f"{estimate.vram_gb:.2f} of {limit_gb} GB"):
            trial, estimate = current()
    if estimate.fits is False:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in estimate.parts.items())
        raise ConfigurationError(
            f"the training needs about {estimate.vram_gb:.2f} GB and {limit_gb} GB are there ({parts})",
            where="vram_limit_gb",
            remedy="Choose a smaller base model or a larger GPU, or give up a value that was fixed",
        )
    return trial, estimate


def _halve_micro_batch(choices: _Choices, trial: TrialConfig, needed: str) -> bool:
    if "micro_batch" in choices.given or trial.micro_batch == 1:
        return False
    choices.change("micro_batch", trial.micro_batch // 2, f"before, the estimate was {needed}")
    if "accumulation" not in choices.given:
        choices.change("accumulation", trial.accumulation * 2, "the effective batch stays")
    return True


def _checkpoint(choices: _Choices, trial: TrialConfig, needed: str) -> bool:
    if "gradient_checkpointing" in choices.given or trial.gradient_checkpointing or trial.method == "prefix":
        return False
    choices.change("gradient_checkpointing", True, f"before, the estimate was {needed}")
    return True


def _quantize(choices: _Choices, trial: TrialConfig, needed: str) -> bool:
    if trial.method != "lora" or trial.use_pissa:
        return False
    choices.change("method", "qlora", f"before, the estimate was {needed}")
    return True


def _halve_length(choices: _Choices, trial: TrialConfig, needed: str) -> bool:
    if "max_length" in choices.given or trial.max_length <= _SHORTEST:
        return False
    choices.change("max_length", max(_SHORTEST, trial.max_length // 2), f"before, the estimate was {needed}")
    return True


def _steps(records: int, trial: TrialConfig) -> int:
    if trial.max_steps is not None:
        return trial.max_steps
    per_epoch = math.ceil(math.ceil(records / trial.micro_batch) / trial.accumulation)
    return max(1, math.ceil(per_epoch * trial.epochs))


def _tokens(profile: DatasetProfile, trial: TrialConfig) -> int | None:
    """Tokens that the training will see, without what is cut off."""
    if profile.total_tokens is None:
        return None
    shares = {cut.max_length: cut.token_share for cut in profile.truncation}
    kept = profile.total_tokens * (1 - shares.get(trial.max_length, 0.0))
    epochs = trial.epochs
    if trial.max_steps is not None:
        epochs = trial.max_steps * trial.effective_batch / profile.total_samples
    return round(kept * epochs)
