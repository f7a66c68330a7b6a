"""Peak memory of a training, by arithmetic from the model's shape.

Sources: weights, gradients and optimizer states as in ZeRO (Rajbhandari et al. 2020, section 3); nf4
with double quantization as in QLoRA (Dettmers et al. 2023, section 3: 4 bits and 0.127 bits of constants
per parameter); activations counted tensor by tensor as in Korthikanti et al. 2022 (section 4), for
today's gated layers, and without weight gradients for what is frozen.
"""

from __future__ import annotations

from typing import Literal

from finetune.planning.model_config import ModelShape
from finetune.planning.models import MemoryEstimate, TrialConfig

_GB = 1e9
_NF4_BYTES = (4 + 0.127) / 8
# Bytes of optimizer state per trained parameter.
_OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "sgd": 0.0,
    "adafactor": 0.1,
}
# What a CUDA context takes before the first tensor, and the share that the caching allocator wastes.
_CUDA_CONTEXT_GB = 0.6
# The tiles in which TRL projects hidden states to logits.
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 8192
_FRAGMENTATION = 0.05


def trainable_parameters(shape: ModelShape, trial: TrialConfig) -> int:
    """How many parameters the method trains.

    lora and qlora: rank x (inputs + outputs) per target (Hu et al. 2021), and one magnitude per output
    with DoRA (Liu et al. 2024); prefix: one key and one value per layer and virtual token (Li & Liang
    2021); ia3: one scale per output of key and value and per input of the second feed-forward module
    (Liu et al. 2022).

    Raises:
        ConfigurationError: `target_modules` names a module that the model lacks.
    """
    if trial.method == "full":
        return shape.parameters
    if trial.method == "prefix":
        return trial.virtual_tokens * shape.layers * 2 * shape.kv_heads * (shape.hidden // shape.heads)
    if trial.method == "ia3":
        scaled = shape.targets(shape.ia3_modules)
        return shape.layers * (sum(linear.outputs for linear in scaled[:-1]) + scaled[-1].inputs)
    targets = shape.targets(trial.target_modules)
    per_layer = sum(trial.lora_rank * (linear.inputs + linear.outputs) for linear in targets)
    if trial.use_dora:
        per_layer += sum(linear.outputs for linear in targets)
    return shape.layers * per_layer


def estimate_memory(
    shape: ModelShape,
    trial: TrialConfig,
    *,
    device: Literal["cpu", "cuda"] = "cuda",
    limit_gb: float | None = None,
    whole_logits: bool = False,
) -> MemoryEstimate:
    """Peak memory in GB (10^9 bytes) of training `shape` as `trial` says.

    Args:
        shape: the model's sizes.
        trial: method, micro-batch, length, precision and all else that takes memory.
        device: a GPU also holds a CUDA context, and its allocator wastes some.
        limit_gb: the memory that is there, for `fits`.
        whole_logits: for engines that make all logits at once; TRL's `SFTTrainer` does not.

    Raises:
        ConfigurationError: `target_modules` names a module that the model lacks.
    """
    width = 2 if trial.precision == "bf16" else 4
    trained = trainable_parameters(shape, trial)
    weights = float(shape.parameters * width)
    if trial.method == "qlora":
        weights -= shape.linear_parameters * (width - _NF4_BYTES)
    parts = {
        "weights": weights / _GB,
        # Adapters are kept and trained in float32, whatever the base model's precision.
        "adapter": 0.0 if trial.method == "full" else trained * 4 / _GB,
        "gradients": trained * (width if trial.method == "full" else 4) / _GB,
        "optimizer": trained * _OPTIMIZER_BYTES.get(trial.optimizer, 8.0) / _GB,
        "activations": _activation_bytes(shape, trial, width) / _GB,
        "logits": _logit_bytes(shape, trial, width, whole_logits) / _GB,
    }
    parts["overhead"] = _CUDA_CONTEXT_GB + _FRAGMENTATION * sum(parts.values()) if device == "cuda" else 0.0
    total = sum(parts.values())
    return MemoryEstimate(
        vram_gb=round(total, 6),
        fits=None if limit_gb is None else total <= limit_gb,
        limit_gb=limit_gb,
        model_params=shape.parameters,
        trainable_params=trained,
        parts={name: round(value, 6) for name, value in parts.items()},
    )


def _activation_bytes(shape: ModelShape, trial: TrialConfig, width: int) -> float:
    """What forward keeps for backward: in one layer while checkpointing, else in all of them."""
    tokens = trial.micro_batch * trial.max_length
    layer = float(tokens * _layer_bytes_per_token(shape, trial, width))
    if trial.gradient_checkpointing:
        return shape.layers * tokens * shape.hidden * width + layer
    # One module's weights at a time are unpacked from 4 bits.
    unpacked = max(linear.parameters for linear in shape.linears) * width if trial.method == "qlora" else 0
    return shape.layers * layer + unpacked


def _layer_bytes_per_token(shape: ModelShape, trial: TrialConfig, width: int) -> float:
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # RMS norms work in float32 and keep their input and its normalized copy; layer norms keep their input.
    norms = shape.other_per_layer // (shape.hidden if shape.gated else 2 * shape.hidden)
    kept = norms * shape.hidden * (8 if shape.gated else width)
    # Query, key, value and output.
    kept += (2 * q + 2 * kv) * width
    if trial.attention == "eager":
        # Scores before and after softmax, which works in float32.
        kept += shape.heads * trial.max_length * (2 * width + 4)
    # Both halves of a gated feed-forward part and the activated one; else the input of the activation.
    kept += (3 if shape.gated else 1) * shape.intermediate * width
    if trial.method == "qlora":
        # Published peaks agree with two copies of each 4-bit module's input (query, key and value share
        # theirs), whether an adapter needs it or not.
        kept += 2 * width * sum(linear.inputs for linear in shape.linears if linear.name not in ("k_proj", "v_proj"))
    return kept + _kept_for_weight_gradients(shape, trial, width)


def _kept_for_weight_gradients(shape: ModelShape, trial: TrialConfig, width: int) -> float:
    """Inputs of modules whose weights are trained: frozen modules need none to pass gradients on."""
    if trial.method not in ("lora", "qlora", "full"):
        return 0.0
    targets = shape.targets("all-linear" if trial.method == "full" else trial.target_modules)
    if trial.method != "full" and trial.lora_dropout > 0:
        # Each adapter drops its own copy, and remembers with one byte what it dropped.
        inputs = sum(linear.inputs * (width + 1) for linear in targets)
    else:
        # Attention's input is shared by query, key and value; the feed-forward input by its halves.
        inputs = width * sum(
            {(linear.inputs, linear.outputs == shape.hidden): linear.inputs for linear in targets}.values()
        )
    return inputs + (0 if trial.method == "full" else trial.lora_rank * len(targets) * width)


def _logit_bytes(shape: ModelShape, trial: TrialConfig, width: int, whole_logits: bool) -> float:
    tokens = trial.micro_batch * trial.max_length
    if whole_logits:
        # The logits, their float32 log-softmax, and the gradient while it is cast back.
        return float(tokens * shape.vocab * (4 + 4 + (width if width < 4 else 4)))
    # TRL projects tile by tile and keeps the gradient of the hidden states in float32.
    tile = min(tokens, _TILE_TOKENS) * min(shape.vocab, _TILE_VOCABULARY)
    return float(tile * (width + 4) + tokens * shape.hidden * 4)
