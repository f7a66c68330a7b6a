"""How vLLM serves an adapter or a merged model, for their cards.

vLLM reads an adapter in PEFT's layout (``adapter_config.json``, ``adapter_model.safetensors``) and takes
one scale and one rank for all modules. Sources: vLLM's docs/features/lora.md, vllm/lora/peft_helper.py and
``MaxLoRARanks`` in vllm/config/lora.py, version 0.26.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_refusal(config: Mapping[str, Any]) -> str | None:
    """Why vLLM cannot serve an adapter of this PEFT configuration on top of its base, or None if it can."""
    if config.get("peft_type") != "LORA":
        return f"vLLM serves LoRA adapters only, this one is {config.get('peft_type')}"
    for name in ("use_dora", "modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            return f"vLLM does not know {name}"
    if config.get("bias", "none") != "none":
        return "vLLM does not load trained biases"
    if config["r"] > _MAX_RANKS[-1]:
        return f"its rank {config['r']} is above vLLM's largest, {_MAX_RANKS[-1]}"
    return None


def vllm_adapter_command(base: str, name: str, config: Mapping[str, Any]) -> str:
    """The command that serves base and adapter; `name` is the model's name in requests."""
    rank = next(rank for rank in _MAX_RANKS if rank >= config["r"])
    return f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=path/to/this/directory"


def vllm_merged_command(name: str) -> str:
    """The command that serves a merged model; `name` is the model's name in requests."""
    return f"vllm serve path/to/this/directory --served-model-name {name}"
