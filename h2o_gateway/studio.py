"""H2O LLM Studio's configuration file, written for version 1.14.

Its fields are those of ``text_causal_language_modeling_config.py``; what is left out keeps H2O's default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from finetune.planning.models import TrialConfig

SCHEDULES = {"cosine": "Cosine", "linear": "Linear", "constant": "Constant", "constant_with_warmup": "Constant"}
# Whether an optimizer's state is paged or its kernel fused decides no result.
OPTIMIZERS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adamw_8bit": "AdamW8bit",
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "AdamW",
}

_LARGEST = (1 << 31) - 1


def refusals(trial: TrialConfig) -> list[str]:
    """What a configuration asks for that H2O LLM Studio cannot do; each names its field."""
    found = {
        "method": trial.method not in ("lora", "qlora") and f"trains lora and qlora, not {trial.method}",
        "use_pissa": trial.use_pissa and "knows no PiSSA",
        "packing": trial.packing and "does not pack records",
        "max_steps": trial.max_steps is not None and "ends after epochs, not after steps",
        "epochs": trial.epochs != int(trial.epochs) and f"counts whole epochs, not {trial.epochs:g}",
        "lora_alpha": (trial.lora_alpha != int(trial.lora_alpha) or trial.lora_alpha < 1)
        and f"wants a whole number from 1, not {trial.lora_alpha:g}",
        "optimizer": trial.optimizer not in OPTIMIZERS
        and f"has no {trial.optimizer!r}; known are {', '.join(OPTIMIZERS)}",
        "seed": not 0 <= trial.seed < 1 << 32 and "wants a seed from 0 to 4294967295",
        "weight_decay": trial.weight_decay < 0 and "wants no negative weight decay",
        "target_modules": trial.target_modules != "all-linear"
        and (not trial.target_modules or any(not name or "," in name for name in trial.target_modules))
        and "wants names without commas, or all-linear",
    }
    found |= {
        field: f"takes no number over {_LARGEST}"
        for field in ("lora_rank", "lora_alpha", "micro_batch", "accumulation", "epochs", "max_length")
        if getattr(trial, field) > _LARGEST
    }
    return [f"config.{field}: H2O LLM Studio {why}" for field, why in found.items() if why]


def configuration(
    trial: TrialConfig,
    *,
    name: str,
    backbone: str,
    revision: str | None,
    table: Path,
    output: Path,
    trust_remote_code: bool,
    workers: int,
) -> dict[str, Any]:
    """The content of the configuration file.

    Args:
        trial: a configuration without `refusals`.
        name: the experiment's name.
        backbone: directory or hub name of the base model.
        revision: branch, tag or commit on the hub.
        table: the Parquet file of `finetune` records, see `h2o_gateway.conversion`.
        output: where H2O LLM Studio writes.
        trust_remote_code: allow code from the base model's repository to run.
        workers: data loading processes.
    """
    bf16 = trial.precision == "bf16"
    dtype = "int4" if trial.method == "qlora" else "bfloat16" if bf16 else "float32"
    all_linear = trial.target_modules == "all-linear"
    return {
        "problem_type": "text_causal_language_modeling",
        "experiment_name": name,
        "output_directory": str(output),
        "llm_backbone": backbone,
        "dataset": {
            "train_dataframe": str(table),
            # H2O wants a validation set; ours is held out already, so training sees all of this one.
            "validation_strategy": "automatic",
            "validation_dataframe": "None",
            "validation_size": 0.01,
            "data_sample": 1.0,
            "personalize": False,
            "id_column": "id",
            "parent_id_column": "parent_id",
            "system_column": "system",
            "prompt_column": ["prompt"],
            "answer_column": "answer",
            "text_system_start": "",
            "text_prompt_start": "",
            "text_answer_separator": "",
            "add_eos_token_to_system": False,
            "add_eos_token_to_prompt": False,
            "add_eos_token_to_answer": False,
            # One sample a conversation, with all of its answers.
            "limit_chained_samples": True,
            "mask_prompt_labels": True,
            "only_last_answer": False,
        },
        "tokenizer": {"max_length": trial.max_length, "add_prompt_answer_tokens": False, "padding_quantile": 1.0},
        "architecture": {
            "backbone_dtype": dtype,
            "gradient_checkpointing": trial.gradient_checkpointing,
            "intermediate_dropout": 0.0,
            "pretrained": True,
            "pretrained_weights": "",
        },
        "training": {
            "loss_function": "TokenAveragedCrossEntropy",
            "optimizer": OPTIMIZERS[trial.optimizer],
            "learning_rate": trial.learning_rate,
            "attention_implementation": trial.attention,
            "batch_size": trial.micro_batch,
            "grad_accumulation": trial.accumulation,
            "drop_last_batch": False,
            "epochs": int(trial.epochs),
            "schedule": SCHEDULES[trial.lr_schedule],
            "warmup_epochs": 0.0 if trial.lr_schedule == "constant" else trial.warmup_ratio * trial.epochs,
            "weight_decay": trial.weight_decay,
            "lora": True,
            "lora_r": trial.lora_rank,
            "lora_alpha": int(trial.lora_alpha),
            "lora_dropout": trial.lora_dropout,
            "use_dora": trial.use_dora,
            "use_rslora": trial.use_rslora,
            # Empty: every linear layer but the head.
            "lora_target_modules": "" if all_linear else ",".join(trial.target_modules),
            "save_checkpoint": "last",
            "evaluation_epochs": 1.0,
            "evaluate_before_training": False,
            "train_validation_data": True,
        },
        "prediction": {"metric": "Perplexity", "batch_size_inference": 0},
        "environment": {
            # The device that CUDA_VISIBLE_DEVICES leaves.
            "gpus": ["0"],
            "mixed_precision": bf16 or trial.method == "qlora",
            "mixed_precision_dtype": "bfloat16",
            "huggingface_branch": revision or "main",
            "number_of_workers": workers,
            "seed": trial.seed,
            "trust_remote_code": trust_remote_code,
        },
        "logging": {"logger": "None", "log_step_size": "absolute"},
    }


def write_configuration(path: Path, content: dict[str, Any]) -> None:
    """Write it as YAML."""
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
