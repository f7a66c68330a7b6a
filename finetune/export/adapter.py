"""What `adapter_config.json` of a PEFT adapter says, without peft."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapter_files import CONFIG_NAME, read_adapter_config
from finetune.errors import ArtifactError


def read_peft_config(adapter_path: Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter whose method is known.

    Raises:
        ArtifactError: missing, not JSON, without a ``peft_type`` that PEFT knows, or LoRA without a rank and scale.
    """
    config = read_adapter_config(adapter_path)
    fault = None
    if config.get("peft_type") == "LORA":
        fault = _scale_fault(config)
    elif not _is_known(config.get("peft_type")):
        fault = f"adapter_config.json names no peft_type that PEFT knows: {config.get('peft_type')!r}"
    if fault:
        raise ArtifactError(
            fault,
            where=adapter_path / CONFIG_NAME,
            remedy="Train the adapter again, or point --adapter at a directory in PEFT's layout",
        )
    return config


def _is_known(peft_type: object) -> bool:
    # Its import takes longer than a merge of LoRA, which does without.
    from peft import PeftType

    return peft_type in set(PeftType)


def _scale_fault(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the ranks and scales of a LoRA configuration, or None."""
    patterns = [config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        return "rank_pattern or alpha_pattern is no object"
    ranks, alphas = patterns
    for value in (config.get("r"), *ranks.values()):
        if type(value) is not int or value < 1:
            return f"a rank is {value!r}, not a positive integer"
    for value in (config.get("lora_alpha"), *alphas.values()):
        if type(value) not in (int, float) or not math.isfinite(value):
            return f"an alpha is {value!r}, not a number"
    for pattern in (*ranks, *alphas):
        try:
            re.compile(pattern)
        except re.error as error:
            return f"the pattern {pattern!r} is no regular expression: {error}"
    return None


def module_rank(config: Mapping[str, Any], module: str) -> int:
    """LoRA's rank of one module.

    Patterns match as in peft: a regular expression for the end of the module's name, whole components.
    """
    return int(_pattern_value(config.get("rank_pattern") or {}, module, config["r"]))


def module_scale(config: Mapping[str, Any], module: str) -> float:
    """LoRA's scale of one module: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
    rank = module_rank(config, module)
    alpha = _pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern_value(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
