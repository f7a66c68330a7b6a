"""What a model's ``config.json`` says about its size: counts by arithmetic, without weights or torch.

Each family below follows the modules that transformers (version 5) builds for its ``model_type``; tests
compare every count with the model built on PyTorch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.chat.template import read_json_object
from finetune.errors import BaseModelError, ConfigurationError

NormKind = Literal["rms", "layer"]
# transformers (version 5) composes this one in Python; its other activations are single operations.
_COMPOSED_ACTIVATIONS = ("gelu_new",)


# What a linear module is given, by the last part of its name.
Source = Literal["attention", "heads", "feed_forward", "product"]
_SOURCES: dict[str, Source] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"), "attention"),
    **dict.fromkeys(("o_proj", "dense"), "heads"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"), "feed_forward"),
    **dict.fromkeys(("down_proj", "fc2", "dense_4h_to_h"), "product"),
}


@dataclass(frozen=True)
class Linear:
    """One linear module of a layer, by the last part of its name."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)

    @property
    def source(self) -> Source:
        """The tensor that it is given, which it may share with others."""
        return _SOURCES[self.name]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer.

    `linears` are those of one layer; ``other_per_layer`` are norms; `head_parameters` is 0 when the
    output head shares the embedding. `ia3_modules` are the modules that (IA)^3 scales, the last of them
    feed-forward (its inputs are scaled). `hidden_norms` counts the normalized inputs of hidden width in a
    layer (two norms may share one). A `composed_activation` is made of several plain operations and keeps
    what each was given. `softcapped` attention bounds its scores by a tanh. Attention is not `fusable`
    where one key head serves all query heads unrepeated: PyTorch's fused kernels want as many. In `windowed` models
    some layers see the last tokens alone.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    gated: bool
    linears: tuple[Linear, ...]
    other_per_layer: int
    embedding_parameters: int
    head_parameters: int
    final_norm: int
    ia3_modules: tuple[str, ...]
    norms: NormKind
    hidden_norms: int
    qk_norm: bool
    composed_activation: bool
    softcapped: bool
    fusable: bool
    windowed: bool

    @property
    def linear_parameters(self) -> int:
        """Parameters of all linear modules in layers: what quantization shrinks."""
        return self.layers * sum(linear.parameters for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return (
            self.linear_parameters
            + self.layers * self.other_per_layer
            + self.embedding_parameters
            + self.head_parameters
            + self.final_norm
        )

    def targets(self, modules: Sequence[str] | Literal["all-linear"]) -> list[Linear]:
        """The linear modules that an adapter is put on.

        Raises:
            ConfigurationError: a name is none of the model's.
        """
        if modules == "all-linear":
            return list(self.linears)
        known = {linear.name: linear for linear in self.linears}
        if unknown := [name for name in modules if name not in known]:
            raise ConfigurationError(
                f"the model has no linear module named {', '.join(unknown)}",
                where="target_modules",
                remedy=f"Choose among {', '.join(known)}, or all-linear",
            )
        return [known[name] for name in modules]


@dataclass
class _Reader:
    """Looks values up in a ``config.json`` and complains by its path."""

    config: dict[str, Any]
    path: Path
    model_type: str = field(init=False)

    def __post_init__(self) -> None:
        self.model_type = str(self.config.get("model_type"))

    def size(self, *names: str) -> int:
        for name in names:
            value = self.config.get(name)
            if isinstance(value, int) and value > 0:
                return value
        raise BaseModelError(
            f"the base model's configuration gives no {names[0]}",
            where=self.path,
            remedy="Download the base model again",
        )

    def size_or(self, default: int, *names: str) -> int:
        return self.size(*names) if any(self.config.get(name) is not None for name in names) else default

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        return default if value is None else bool(value)

    def shape(
        self,
        linears: Sequence[Linear],
        other_per_layer: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        intermediate: int,
        ia3_modules: tuple[str, ...],
        gated: bool = True,
        tied: bool = False,
        head_bias: bool = False,
        norms: NormKind = "rms",
        hidden_norms: int = 2,
        qk_norm: bool = False,
        activation: str = "silu",
        fusable: bool = True,
    ) -> ModelShape:
        hidden, vocab = self.size("hidden_size"), self.size("vocab_size")
        head = 0 if self.flag("tie_word_embeddings", tied) else vocab * hidden
        return ModelShape(
            model_type=self.model_type,
            hidden=hidden,
            layers=self.size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=intermediate,
            vocab=vocab,
            max_positions=self.size_or(2048, "max_position_embeddings"),
            gated=gated,
            linears=tuple(linears),
            other_per_layer=other_per_layer,
            embedding_parameters=vocab * hidden,
            head_parameters=head + (vocab if head_bias else 0),
            # Layer norms have biases.
            final_norm=hidden * (2 if norms == "layer" else 1),
            ia3_modules=ia3_modules,
            norms=norms,
            hidden_norms=hidden_norms,
            qk_norm=qk_norm,
            composed_activation=(self.config.get("hidden_act") or activation) in _COMPOSED_ACTIVATIONS,
            fusable=fusable,
            softcapped=self.config.get("attn_logit_softcapping") is not None,
            windowed=bool(self.config.get("sliding_window")) and self.flag("use_sliding_window", True),
        )


def _llama_like(
    reader: _Reader,
    *,
    qkv_bias: bool = False,
    norms: int = 2,
    qk_norm: bool = False,
    tied: bool = False,
    head_dim: int | None = None,
    fused: bool = False,
) -> ModelShape:
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    kv_heads = reader.size_or(heads, "num_key_value_heads")
    width = reader.size_or(head_dim or hidden // heads, "head_dim")
    intermediate = reader.size("intermediate_size")
    attention_bias = reader.flag("attention_bias", False)
    qkv_bias = qkv_bias or attention_bias
    mlp_bias = reader.flag("mlp_bias", False)
    q, kv = heads * width, kv_heads * width
    if fused:
        linears = [
            Linear("qkv_proj", hidden, q + 2 * kv),
            Linear("o_proj", q, hidden),
            Linear("gate_up_proj", hidden, 2 * intermediate),
            Linear("down_proj", intermediate, hidden),
        ]
    else:
        linears = [
            Linear("q_proj", hidden, q, qkv_bias),
            Linear("k_proj", hidden, kv, qkv_bias),
            Linear("v_proj", hidden, kv, qkv_bias),
            Linear("o_proj", q, hidden, attention_bias),
            Linear("gate_proj", hidden, intermediate, mlp_bias),
            Linear("up_proj", hidden, intermediate, mlp_bias),
            Linear("down_proj", intermediate, hidden, mlp_bias),
        ]
    return reader.shape(
        linears,
        norms * hidden + (2 * width if qk_norm else 0),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        intermediate=intermediate,
        ia3_modules=("qkv_proj", "down_proj") if fused else ("k_proj", "v_proj", "down_proj"),
        tied=tied,
        hidden_norms=norms,
        qk_norm=qk_norm,
    )


def _phi(reader: _Reader) -> ModelShape:
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    kv_heads = reader.size_or(heads, "num_key_value_heads")
    width, intermediate = hidden // heads, reader.size("intermediate_size")
    return reader.shape(
        [
            Linear("q_proj", hidden, hidden, bias=True),
            Linear("k_proj", hidden, kv_heads * width, bias=True),
            Linear("v_proj", hidden, kv_heads * width, bias=True),
            Linear("dense", hidden, hidden, bias=True),
            Linear("fc1", hidden, intermediate, bias=True),
            Linear("fc2", intermediate, hidden, bias=True),
        ],
        2 * hidden + (4 * width if reader.flag("qk_layernorm", False) else 0),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        intermediate=intermediate,
        ia3_modules=("k_proj", "v_proj", "fc2"),
        gated=False,
        head_bias=True,
        norms="layer",
        hidden_norms=1,
        qk_norm=reader.flag("qk_layernorm", False),
        activation="gelu_new",
    )


def _gpt_neox(reader: _Reader) -> ModelShape:
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    intermediate = reader.size("intermediate_size")
    bias = reader.flag("attention_bias", True)
    return reader.shape(
        [
            Linear("query_key_value", hidden, 3 * hidden, bias),
            Linear("dense", hidden, hidden, bias),
            Linear("dense_h_to_4h", hidden, intermediate, bias=True),
            Linear("dense_4h_to_h", intermediate, hidden, bias=True),
        ],
        4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=intermediate,
        ia3_modules=("query_key_value", "dense_4h_to_h"),
        gated=False,
        norms="layer",
        hidden_norms=1 if reader.flag("use_parallel_residual", True) else 2,
    )


def _falcon(reader: _Reader) -> ModelShape:
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads", "n_head")
    width = hidden // heads
    new = reader.flag("new_decoder_architecture", False)
    old_kv_heads = 1 if reader.flag("multi_query", True) else heads
    kv_heads = reader.size_or(heads, "num_kv_heads") if new else old_kv_heads
    intermediate = reader.size_or(4 * hidden, "ffn_hidden_size")
    bias = reader.flag("bias", False)
    norms = 1 if reader.flag("parallel_attn", True) and not new else 2
    return reader.shape(
        [
            Linear("query_key_value", hidden, (heads + 2 * kv_heads) * width, bias),
            Linear("dense", hidden, hidden, bias),
            Linear("dense_h_to_4h", hidden, intermediate, bias),
            Linear("dense_4h_to_h", intermediate, hidden, bias),
        ],
        norms * 2 * hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        intermediate=intermediate,
        ia3_modules=("query_key_value", "dense_4h_to_h"),
        gated=False,
        tied=True,
        norms="layer",
        hidden_norms=1 if reader.flag("parallel_attn", True) else 2,
        fusable=new or kv_heads == heads,
    )


FAMILIES: dict[str, Callable[[_Reader], ModelShape]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": lambda reader: _llama_like(reader, qkv_bias=True),
    "qwen3": lambda reader: _llama_like(reader, qk_norm=True, head_dim=128),
    "gemma": lambda reader: _llama_like(reader, tied=True, head_dim=256),
    "gemma2": lambda reader: _llama_like(reader, tied=True, head_dim=256, norms=4),
    "gemma3_text": lambda reader: _llama_like(reader, tied=True, head_dim=256, norms=4, qk_norm=True),
    "phi": _phi,
    "phi3": lambda reader: _llama_like(reader, fused=True),
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
}


def read_model_shape(model_dir: Path) -> ModelShape:
    """The shape of the model in a directory that holds at least its ``config.json``.

    Raises:
        BaseModelError: the file is missing or damaged, or the model is of a family not in `FAMILIES`.
    """
    path = model_dir / "config.json"
    reader = _Reader(read_json_object(path), path)
    family = FAMILIES.get(reader.model_type)
    if family is None:
        raise BaseModelError(
            f"models of the type {reader.model_type} cannot be planned for",
            where=path,
            remedy=f"Choose a base model of one of the types {', '.join(sorted(FAMILIES))}",
        )
    return family(reader)
