"""The base model in memory, and the adapter's configuration for each method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from finetune.base_model.models import BaseModelRef
from finetune.base_model.remote_code import remedy_for
from finetune.errors import BaseModelError, ConfigurationError
from finetune.planning.model_config import ModelShape
from finetune.planning.models import TrainableMethod, TrialConfig
from finetune.training.packed_attention import attend_by_record

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.nn import Module
    from transformers import PreTrainedModel


def peft_config(shape: ModelShape, trial: TrialConfig) -> PeftConfig:
    """PEFT's configuration of the plan's method.

    Raises:
        ConfigurationError: the method is not trained, or `target_modules` names a module that the model lacks.
    """
    from peft import IA3Config, LoraConfig, PrefixTuningConfig

    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    match trial.method:
        case "lora" | "qlora":
            return LoraConfig(
                **common,
                r=trial.lora_rank,
                lora_alpha=trial.lora_alpha,
                lora_dropout=trial.lora_dropout,
                target_modules=[linear.name for linear in shape.targets(trial.target_modules)],
                use_rslora=trial.use_rslora,
                use_dora=trial.use_dora,
                init_lora_weights="pissa" if trial.use_pissa else True,
            )
        case "prefix":
            return PrefixTuningConfig(**common, num_virtual_tokens=trial.virtual_tokens)
        case "ia3":
            modules = list(shape.ia3_modules)
            return IA3Config(**common, target_modules=modules, feedforward_modules=modules[-1:])
        case _:
            raise _untrained(trial)


def refuse_untrained(trial: TrialConfig) -> None:
    """Check that the plan's method is one that is trained.

    Raises:
        ConfigurationError: it is only estimated.
    """
    if trial.method not in get_args(TrainableMethod):
        raise _untrained(trial)


def _untrained(trial: TrialConfig) -> ConfigurationError:
    return ConfigurationError(
        f"the method {trial.method} is estimated in plans but not trained",
        where="method",
        remedy=f"Choose {', '.join(get_args(TrainableMethod))}",
    )


def refuse_missing_hardware(trial: TrialConfig) -> None:
    """Check that this machine can train as the configuration says, before anything is loaded.

    Raises:
        ConfigurationError: the method is not trained; a GPU is needed and none is there; bitsandbytes is missing.
    """
    refuse_untrained(trial)
    import importlib.util

    import torch

    needs_gpu = {
        "flash attention": trial.attention == "flash_attention_2",
        f"the optimizer {trial.optimizer}": trial.optimizer.startswith("paged_"),
    }
    missing = [name for name, needed in needs_gpu.items() if needed]
    if missing and not torch.cuda.is_available():
        raise ConfigurationError(
            f"{missing[0]} needs a GPU, and PyTorch sees none here",
            where=f"the plan's trial {trial.trial_id}",
            remedy="Run on a machine with an NVIDIA GPU and its driver, or plan for the CPU",
        )
    needs_bitsandbytes = trial.method == "qlora" or trial.optimizer.endswith("_8bit")
    if needs_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            "qlora and 8-bit optimizers need bitsandbytes, which is not installed",
            where=f"the plan's trial {trial.trial_id}",
            remedy="Install lora-assets[train], or choose the method lora",
        )


def refuse_unshardable(trial: TrialConfig) -> None:
    """Check that the plan's method can be trained while every process holds a part of the base model's weights only.

    Raises:
        ConfigurationError: it computes with whole weights, or with weights that are not plain numbers.
    """
    whole = {"DoRA": trial.use_dora, "PiSSA": trial.use_pissa, "qlora": trial.method == "qlora"}
    if named := [name for name, wanted in whole.items() if wanted]:
        raise ConfigurationError(
            f"{named[0]} needs the base model's weights whole in every process",
            where="TRAIN_SHARDING=fsdp",
            remedy="Train with TRAIN_SHARDING=ddp, or plan for plain LoRA",
        )


def load_base_model(base_model: BaseModelRef, trial: TrialConfig, *, shards: int = 1) -> PreTrainedModel:
    """The base model as the plan wants it: its precision, its attention, in 4 bits for qlora.

    With several `shards` every process reads and keeps its part of the weights alone (FSDP2), and has a layer's whole
    only while it computes with it; what an adapter adds to the model later stays whole everywhere.

    Raises:
        BaseModelError: the weights are missing, damaged, or not those of the configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if trial.precision == "bf16" else torch.float32
    options: dict[str, Any] = {}
    if trial.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if shards > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=shards)
    remedy = "Download the base model again, or point BASE_MODEL_NAME at a whole model directory"
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            base_model.path,
            dtype=dtype,
            attn_implementation=trial.attention,
            local_files_only=True,
            trust_remote_code=base_model.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    # The libraries below raise many kinds of errors for a damaged file; all of them mean the same.
    except Exception as error:
        raise BaseModelError(
            f"the base model {base_model.name} cannot be loaded: {error}",
            where=base_model.path,
            remedy=remedy_for(error, remedy),
        ) from error
    # What a checkpoint lacks is filled with random numbers, and only a warning says so.
    for kind in ("missing_keys", "mismatched_keys"):
        if loading.get(kind):
            names = ", ".join(sorted(map(str, loading[kind]))[:3])
            raise BaseModelError(
                f"the base model {base_model.name} has {kind.replace('_', ' ')}: {names}",
                where=base_model.path,
                remedy=remedy,
            )
    if trial.packing:
        attend_by_record(model)
    return model


def save_no_shards(model: PeftModel) -> None:
    """Keep parts of the base model out of the model's state: what is saved is the adapter, which is whole everywhere.

    PEFT would gather all of the base model in every process to write a checkpoint.
    """
    from torch.distributed.tensor import DTensor

    def drop(module: Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name, value in state.items() if isinstance(value, DTensor)]:
            del state[name]

    model.register_state_dict_post_hook(drop)


def save_pissa_start(model: PeftModel, directory: Path) -> None:
    """Keep a PiSSA adapter as it starts: `save_adapter` needs it to tell what was learned."""
    config = model.peft_config["default"]
    # Loaded again, it must not be computed anew from singular vectors.
    config.init_lora_weights = True
    model.save_pretrained(str(directory), save_embedding_layers=False)
    config.init_lora_weights = "pissa"


def save_adapter(model: PeftModel, directory: Path, base_model: BaseModelRef, pissa_start: Path) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` that name the base model, not its path.

    A PiSSA adapter is turned into a plain LoRA of twice the rank that fits the untouched base model (Meng
    et al. 2024, appendix on PiSSA's conversion).
    """
    config = model.peft_config["default"]
    conversion = {}
    if getattr(config, "init_lora_weights", None) == "pissa":
        conversion = {"path_initial_model_for_weight_conversion": str(pissa_start)}
    # No embedding was resized; to find that out, peft would ask the hub.
    model.save_pretrained(str(directory), save_embedding_layers=False, **conversion)
    path = directory / "adapter_config.json"
    content = json.loads(path.read_bytes())
    content |= {"base_model_name_or_path": base_model.name, "revision": base_model.revision}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
