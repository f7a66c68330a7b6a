"""Which tensor gets which type: llama.cpp's rule for dense text models.

Source: ``llama_tensor_get_type`` and ``tensor_allows_quantization`` in llama.cpp's src/llama-quant.cpp,
release b10605, without importance matrices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finetune.errors import ConfigurationError, ExportError

# llama.cpp's name of a quantization: its number (llama_ftype) and the type of an ordinary tensor.
QUANTIZATIONS: dict[str, tuple[int, str]] = {
    "Q8_0": (7, "Q8_0"),
    "Q6_K": (18, "Q6_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q4_K_M": (15, "Q4_K"),
    "Q4_0": (2, "Q4_0"),
    "Q2_K": (10, "Q2_K"),
}
FULL_PRECISIONS = ("F32", "F16", "BF16")
_BLOCK_SIZES = {"Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256, "Q4_0": 32, "Q5_0": 32, "Q5_1": 32}
_BLOCK_SIZES |= {"Q8_0": 32, "F16": 1}
# A row that is no whole number of 256-element blocks falls back to a type with 32-element blocks.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_ATTENTION_V = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")
_KEPT = ("_norm.weight", "altup", "laurel", "per_layer_model_proj")
# Marks of mixtures of experts, recurrent and encoder models, for which llama.cpp has rules of their own.
_OTHER_RULES = ("_exps", "ffn_gate_inp", "ssm_", "time_mix", "shortconv", "attn_rel_b", "position_embd", "token_types")


@dataclass(frozen=True)
class ModelShape:
    """What the choice of types depends on, from the GGUF file's metadata."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int

    @property
    def seventy_billion(self) -> bool:
        """llama.cpp's notion of a 70B model: eight heads share one attention value, which gets more bits."""
        if self.layers != 80:
            return False
        return self.architecture in ("qwen2", "deci", "olmo") or (
            self.architecture == "llama" and self.heads != self.kv_heads
        )


def check_quantization(quantization: str) -> str:
    """Return the name as it is if it is one of ours.

    Raises:
        ConfigurationError: it is not.
    """
    if quantization in QUANTIZATIONS or quantization in FULL_PRECISIONS:
        return quantization
    allowed = ", ".join((*FULL_PRECISIONS, *QUANTIZATIONS))
    raise ConfigurationError(f"unknown quantization {quantization!r}", remedy=f"Use one of {allowed}")


def choose_types(
    quantization: str, tensors: Iterable[tuple[str, tuple[int, ...], str]], shape: ModelShape
) -> dict[str, str]:
    """The type of every tensor, by name, as llama.cpp chooses it.

    Args:
        quantization: one of `QUANTIZATIONS`.
        tensors: name, dimensions (row size first, as in GGUF) and present type, in the new file's order.
        shape: the model's.

    Raises:
        ExportError: a model of a kind for which llama.cpp has other rules.
    """
    listed = list(tensors)
    exotic = next((name for name, _, _ in listed if any(mark in name for mark in _OTHER_RULES)), None)
    if exotic or shape.architecture == "falcon":
        raise ExportError(
            f"quantizing the architecture {shape.architecture} needs llama.cpp's own program",
            where=exotic,
            remedy="Put llama-quantize on PATH, or choose F16",
        )
    names = [name for name, _, _ in listed]
    counts = _Counts(sum(map(_is_attention_v, names)))
    tied = "output.weight" not in names
    chosen: dict[str, str] = {}
    for name, dimensions, present in listed:
        if len(dimensions) < 2 or not name.endswith("weight") or any(part in name for part in _KEPT):
            chosen[name] = present
        elif name == "output.weight" or (tied and name == "token_embd.weight"):
            chosen[name] = _output_type(quantization, dimensions[0])
        else:
            chosen[name] = _fit(_layer_type(quantization, name, shape, counts), dimensions[0])
    return chosen


@dataclass
class _Counts:
    """How many attention values there are, and how many of them and of the down projections were seen."""

    attention_v: int
    seen_attention_v: int = 0
    seen_down: int = 0


def _is_attention_v(name: str) -> bool:
    return any(part in name for part in _ATTENTION_V)


def _output_type(quantization: str, row: int) -> str:
    default = QUANTIZATIONS[quantization][1]
    return "Q8_0" if row % _BLOCK_SIZES[default] or default == "Q8_0" else _fit("Q6_K", row)


def _layer_type(quantization: str, name: str, shape: ModelShape, counts: _Counts) -> str:
    medium = quantization in ("Q4_K_M", "Q5_K_M")
    default = QUANTIZATIONS[quantization][1]
    if _is_attention_v(name):
        layer = counts.seen_attention_v
        counts.seen_attention_v += 1
        if quantization == "Q2_K":
            default = "Q4_K" if shape.heads >= 4 * shape.kv_heads else "Q3_K"
        elif medium and _more_bits(layer, counts.attention_v):
            default = "Q6_K"
        return "Q5_K" if shape.seventy_billion and default in ("Q3_K", "Q4_K") else default
    if "ffn_down" in name:
        layer = counts.seen_down
        counts.seen_down += 1
        if medium and _more_bits(layer, shape.layers):
            return "Q6_K"
    if quantization == "Q2_K" and ("ffn_down" in name or "attn_output.weight" in name):
        return "Q3_K"
    return default


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fit(kind: str, row: int) -> str:
    if row % _BLOCK_SIZES[kind] == 0:
        return kind
    fallback = _FALLBACK.get(kind, "F16")
    return fallback if row % _BLOCK_SIZES[fallback] == 0 else "F16"
