"""A PEFT adapter as it lies on disk, without peft: its configuration and its scales."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapter_files import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config
from finetune.errors import ArtifactError

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
# Adapters with any of these do more than change weights one by one.
_NOT_BY_TENSOR = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


@dataclass(frozen=True)
class LoraPair:
    """One adapted module: the weight's update is ``scale * B @ A``, transposed where `fan_in_fan_out`.

    `a` is (rank, in), `b` (out, rank), both float32. With DoRA (arXiv:2402.09353) `magnitude`, (out,), is the length
    that every row of the sum of weight and update gets.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    fan_in_fan_out: bool
    magnitude: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return int(self.b.shape[0] * self.a.shape[1])

    def delta(self, scratch: torch.Tensor) -> torch.Tensor:
        """The update in the weight's own layout, float32.

        Args:
            scratch: at least `size` elements that are written over: fresh memory for every product costs more
                than the product.
        """
        import torch

        product = torch.mm(self.b, self.a, out=scratch[: self.size].view(self.b.shape[0], self.a.shape[1]))
        return (product.T if self.fan_in_fan_out else product).mul_(self.scale)


@dataclass(frozen=True)
class Updates:
    """What an adapter does to a model: `pairs` by module name, whole new tensors (`replaced`) by tensor name."""

    pairs: dict[str, LoraPair]
    replaced: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.pairs) + len(self.replaced)


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


def is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Whether the adapter only adds scaled low-rank products to weights."""
    return _by_tensor(config) and not config.get("use_dora") and not config.get("modules_to_save")


def _by_tensor(config: Mapping[str, Any]) -> bool:
    return (
        config["peft_type"] == "LORA"
        and config.get("bias", "none") == "none"
        and not any(config.get(name) for name in _NOT_BY_TENSOR)
    )


def module_scale(config: Mapping[str, Any], module: str) -> float:
    """LoRA's scale of one module: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732).

    Patterns match as in peft: a regular expression for the end of the module's name, whole components.
    """
    rank = _pattern_value(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern_value(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_lora_pairs(adapter_path: Path, config: Mapping[str, Any]) -> dict[str, LoraPair] | None:
    """The pairs of a plain LoRA adapter by module name, or None where it holds anything else.

    Raises:
        ArtifactError: a pair is incomplete or does not fit together, or the weights are damaged.
    """
    updates = read_updates(adapter_path, config) if is_plain_lora(config) else None
    return None if updates is None or updates.replaced else updates.pairs


def read_updates(adapter_path: Path, config: Mapping[str, Any]) -> Updates | None:
    """What LoRA, rsLoRA, DoRA and `modules_to_save` do to tensors, or None where the adapter holds anything else.

    Raises:
        ArtifactError: a pair is incomplete or does not fit together, or the weights are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not _by_tensor(config):
        return None
    path = adapter_path / WEIGHTS_NAME
    remedy = "Train the adapter again"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"unreadable adapter weights: {error}", where=path, remedy=remedy) from error
    saved = tuple(config.get("modules_to_save") or ())
    sides: dict[str, dict[str, torch.Tensor]] = {}
    replaced: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?", name)
        if match is not None and tensor.ndim == (1 if match[2] == "magnitude_vector" else 2):
            sides.setdefault(match[1], {})[match[2]] = tensor.float()
        elif match is None and name.startswith(_PREFIX) and name.rpartition(".")[0].endswith(saved):
            replaced[name.removeprefix(_PREFIX)] = tensor
        else:
            return None
    whole = {"A", "B", "magnitude_vector"} if config.get("use_dora") else {"A", "B"}
    pairs = {}
    for module, side in sides.items():
        if side.keys() != whole:
            raise ArtifactError(f"the adapter has only one half of {module}", where=path, remedy=remedy)
        rank = _pattern_value(config.get("rank_pattern") or {}, module, config["r"])
        outputs = len(side["B"])
        if not len(side["A"]) == side["B"].shape[1] == rank or len(side.get("magnitude_vector", side["B"])) != outputs:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(side.items()))
            raise ArtifactError(
                f"the adapter's tensors of {module} do not fit each other and rank {rank}: {shapes}",
                where=path,
                remedy=remedy,
            )
        pairs[module] = LoraPair(
            side["A"],
            side["B"],
            module_scale(config, module),
            bool(config.get("fan_in_fan_out")),
            side.get("magnitude_vector"),
        )
    return Updates(pairs, replaced)
