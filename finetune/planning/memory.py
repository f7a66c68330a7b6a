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
) -> MemoryEstimate:
    """Peak memory in GB (10^9 bytes) of training `shape` as `trial` says.

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
        "logits": _logit_bytes(shape, trial, width) / _GB,
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
    tokens = trial.micro_batch * trial.max_length
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Norms keep their input and its normalized copy; attention its query, key, value and output; the
    # feed-forward part its halves before and after the activation, and their product.
    feed_forward = (4 if shape.gated else 2) * shape.intermediate
    per_token = (4 * shape.hidden + 2 * q + 2 * kv + feed_forward) * width
    if trial.attention == "eager":
        # Scores before and after softmax, the latter in float32 too.
        per_token += shape.heads * trial.max_length * (2 * width + 4)
    if trial.method in ("lora", "qlora"):
        targets = shape.targets(trial.target_modules)
        per_token += sum(trial.lora_rank for _ in targets) * width
        if trial.lora_dropout > 0:
            per_token += sum(linear.inputs for linear in targets) * width
    layer = float(tokens * per_token)
    if trial.gradient_checkpointing:
        return shape.layers * tokens * shape.hidden * width + layer
    dequantized = max(linear.parameters for linear in shape.linears) * width if trial.method == "qlora" else 0
    return shape.layers * layer + dequantized


def _logit_bytes(shape: ModelShape, trial: TrialConfig, width: int) -> float:
    tokens = trial.micro_batch * trial.max_length
    # The logits, their float32 copy in the loss, and the gradient of each.
    return float(tokens * shape.vocab * (2 * width + (8 if width == 2 else 0)))
