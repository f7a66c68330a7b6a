"""From a profile to a training configuration that fits the machine, each choice explained.

The choices and their sources are in `finetune.planning.rules`, the order in which memory is saved in
`finetune.planning.fitting`, the memory itself in `finetune.planning.memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.dataset.models import DatasetProfile
from finetune.errors import ConfigurationError
from finetune.planning import rules
from finetune.planning.contradictions import refuse_contradictions
from finetune.planning.cost import estimate_cost
from finetune.planning.fitting import Choices, fit
from finetune.planning.history import Measurement
from finetune.planning.model_config import ModelShape, read_model_shape
from finetune.planning.models import Method, Task, TrainingPlan, TrialConfig
from finetune.planning.overrides import PlanOverrides
from finetune.planning.rules import Device
from finetune.planning.search_space import search_space
from finetune.publishing import sha256_json


def trial_id_of(trial: TrialConfig) -> str:
    """A short stable name of everything in a configuration but its own name."""
    return sha256_json(trial.model_dump(exclude={"trial_id"}))[:10]


def make_plan(
    model_dir: Path,
    profile: DatasetProfile,
    *,
    task: Task = "instruction",
    method: Method | None = None,
    overrides: PlanOverrides | None = None,
    vram_limit_gb: float | None = None,
    device: Device = "cpu",
    history: Sequence[Measurement] = (),
    stated_tokens_per_second: float | None = None,
    price_per_gpu_hour: float | None = None,
) -> TrainingPlan:
    """Choose a configuration for a model, a dataset and a machine.

    Args:
        model_dir: a directory that holds at least the model's ``config.json``.
        profile: the dataset's statistics with this model's tokenizer.
        task: what the model shall learn; decides the rank.
        method: how; None is lora, or qlora where lora does not fit.
        overrides: values that are kept as given.
        vram_limit_gb: memory of the device in GB (10^9 bytes), or None for no limit.
        device: where the training will run.
        history: earlier trainings of this model on such a device, newest first; they correct the estimates.
        stated_tokens_per_second: throughput to expect where none was measured.
        price_per_gpu_hour: in any currency.

    Raises:
        BaseModelError: the model's configuration is missing, damaged or of an unknown family.
        ConfigurationError: the values given contradict each other, or nothing fits the memory.
    """
    shape = read_model_shape(model_dir)
    given = (overrides or PlanOverrides()).model_dump(exclude_none=True)
    if method is not None:
        given["method"] = method
    choices = _choose(shape, profile, task, given, device)
    chosen = TrialConfig.model_validate(choices.values)
    refuse_contradictions(chosen, shape)
    if device == "cpu":
        _refuse_missing_gpu(chosen)
    trial, estimate = fit(shape, choices, vram_limit_gb, device, history)
    trial = trial.model_copy(update={"trial_id": trial_id_of(trial)})
    tokens = _tokens(profile, trial)
    return TrainingPlan(
        trial_config=trial,
        search_space=search_space(shape, trial, estimate, device),
        memory_estimate=estimate,
        explanations=choices.explanations,
        estimated_steps=trial.steps(profile.total_samples),
        estimated_tokens=tokens,
        cost=estimate_cost(
            tokens,
            trial.method,
            history=history,
            stated_tokens_per_second=stated_tokens_per_second,
            price_per_gpu_hour=price_per_gpu_hour,
        ),
    )


def _choose(shape: ModelShape, profile: DatasetProfile, task: Task, given: dict[str, Any], device: Device) -> Choices:
    choices = Choices(given, values={"trial_id": "", "task": task})
    settle = choices.settle
    method: Method = settle("method", "lora", "adapters learn such tasks as well as full fine-tuning does")
    if method in ("lora", "qlora"):
        rank = settle("lora_rank", *rules.rank(task))
        settle("lora_alpha", *rules.alpha(rank))
        settle("lora_dropout", *rules.dropout(shape, method))
        settle("target_modules", *rules.target_modules())
        for flag in ("use_rslora", "use_dora", "use_pissa"):
            settle(flag, False, "plain LoRA unless asked for")
    if method == "prefix":
        settle("virtual_tokens", *rules.virtual_tokens())
    settle("learning_rate", *rules.learning_rate(shape, method))
    settle("lr_schedule", *rules.schedule())
    settle("warmup_ratio", *rules.warmup_ratio())
    settle("weight_decay", *rules.weight_decay())
    settle("optimizer", *rules.optimizer(method, device))
    epochs = settle("epochs", *rules.epochs())
    length = settle("max_length", *rules.max_length(shape, profile))
    settle("packing", False, "records of similar length are computed together, so that little is padded")
    _settle_batch(choices, profile.total_samples, epochs, length, device)
    settle("precision", *rules.precision(device))
    settle("gradient_checkpointing", False, "it costs a third more time; on where memory asks for it")
    settle("attention", *rules.attention(shape))
    settle("seed", 42, "fixed, so that the run can be repeated")
    if "max_steps" in given:
        settle("max_steps", None, "")
    return choices


def _settle_batch(choices: Choices, records: int, epochs: float, length: int, device: Device) -> None:
    batch, reason = rules.effective_batch(records, epochs)
    if "accumulation" in choices.given and "micro_batch" not in choices.given:
        micro = max(1, batch // choices.given["accumulation"])
    else:
        micro = rules.micro_batch(batch, length, device)
    at_a_time = f"at a time what fills a pass of {length} tokens each, at most a quarter"
    micro = choices.settle("micro_batch", micro, f"{reason}; {at_a_time}")
    choices.settle("accumulation", max(1, batch // micro), f"towards an effective batch of {batch}, well under 32")


def _refuse_missing_gpu(trial: TrialConfig) -> None:
    if trial.attention == "flash_attention_2":
        raise ConfigurationError(
            "flash attention needs a GPU, and none is planned for", where="attention", remedy="Use sdpa"
        )
    if trial.optimizer.startswith("paged_"):
        raise ConfigurationError(
            f"the optimizer {trial.optimizer} needs a GPU, and none is planned for",
            where="optimizer",
            remedy="Use adamw_torch_fused",
        )


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
