"""A plain LoRA configuration, and what lies in the files of a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)


def weights(model: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
