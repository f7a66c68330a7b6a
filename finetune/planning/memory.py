"""Peak memory of a training, by arithmetic from the model's shape.

| part | bytes | source |
| --- | --- | --- |
| weights | parameters x width; 4.127 bits for each linear parameter in layers with qlora | QLoRA, section 3 |
| adapter | trained parameters x 4 | PEFT keeps adapters in float32 |
| gradients | trained parameters x their width | ZeRO (Rajbhandari et al. 2020), section 3 |
| optimizer | trained parameters x states x their width | ZeRO, section 3; 8-bit: Dettmers et al. 2022 |
| activations | what all layers keep for backward; with checkpointing (Chen et al. 2016) each layer's input \
and what one layer keeps | `finetune.planning.activations` |
| logits | tile by tile, or whole: logits, log-softmax, gradients | the trainer's own code |
| overhead | CUDA context, and a share that the caching allocator holds without using it | calibrated |

What a layer needs while it is differentiated and what the loss needs are never there at the same time: the
larger one counts. The gradients of full fine-tuning appear as activations go, unless they accumulate.
"""

from __future__ import annotations

from typing import Literal

from finetune.planning.activations import layer_bytes_per_token
from finetune.planning.framework import TRL, Framework
from finetune.planning.model_config import ModelShape
from finetune.planning.models import MemoryEstimate, Optimizer, TrialConfig

_GB = 1e9
_BITS_PER_BYTE = 8
# Optimizer states per trained parameter and bytes of each, None for the parameter's own.
_OPTIMIZERS: dict[Optimizer, tuple[float, int | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_8bit": (2, 1),
    "paged_adamw_8bit": (2, 1),
    "paged_adamw_32bit": (2, 4),
    "sgd": (0, None),
    # Row and column sums in place of a matrix (Shazeer & Stern 2018).
    "adafactor": (0.025, 4),
}
# The tiles in which TRL projects hidden states to logits.
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 8192


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
    framework: Framework = TRL,
    correction: float = 1.0,
) -> MemoryEstimate:
    """Peak memory in GB (10^9 bytes) of training `shape` as `trial` says.

    Args:
        shape: the model's sizes.
        trial: method, micro-batch, length, precision and all else that takes memory.
        device: a GPU also holds a CUDA context, and its allocator wastes some.
        limit_gb: the memory that is there, for `fits`.
        framework: whose training it is.
        correction: what earlier trainings took, measured / estimated.

    Raises:
        ConfigurationError: `target_modules` names a module that the model lacks.
    """
    width = 2 if trial.precision == "bf16" else 4
    trained = trainable_parameters(shape, trial)
    trained_width = width if trial.method == "full" else framework.adapter_bytes
    weights = _weight_bytes(shape, trial, framework, width)
    weights *= 1 / framework.shards + (1 if framework.gathers_frozen else 0)
    kept, loss, backward = _passing_bytes(shape, trial, framework, width, device)
    activations, logits = kept + backward, max(0.0, loss - backward)
    if trial.method != "full" and trained_width > width:
        # Adapters in float32 are cast for 16-bit work, once a pass.
        activations += trained * width
    gradients = _gradient_bytes(shape, trial, framework, trained, trained_width, activations + logits)
    states, state_width = _OPTIMIZERS[trial.optimizer]
    parts = {
        "weights": weights,
        "adapter": 0.0 if trial.method == "full" else trained * trained_width / framework.shards,
        "gradients": gradients / framework.shards,
        "optimizer": trained * states * (state_width or trained_width) / framework.shards,
        "activations": activations,
        "logits": logits,
    }
    parts["overhead"] = 0.0
    if device == "cuda":
        parts["overhead"] = framework.context_gb * _GB + framework.fragmentation * sum(parts.values())
    if correction != 1.0:
        parts["correction"] = sum(parts.values()) * (correction - 1)
    total = sum(parts.values())
    return MemoryEstimate(
        vram_gb=round(total / _GB, 6),
        fits=None if limit_gb is None else total <= limit_gb * _GB,
        limit_gb=limit_gb,
        model_params=shape.parameters,
        trainable_params=trained,
        parts={name: round(value / _GB, 6) for name, value in parts.items()},
        correction=correction,
    )


def _weight_bytes(shape: ModelShape, trial: TrialConfig, framework: Framework, width: int) -> float:
    head = shape.head_parameters or (shape.embedding_parameters if framework.own_head else 0)
    parameters = shape.parameters - shape.head_parameters + head
    quantized = shape.linear_parameters + (head if framework.quantizes_head else 0)
    if not framework.quantizes(trial):
        quantized = 0
    return parameters * width - quantized * (width - framework.nf4_bits / _BITS_PER_BYTE)


def _passing_bytes(
    shape: ModelShape, trial: TrialConfig, framework: Framework, width: int, device: Literal["cpu", "cuda"]
) -> tuple[float, float, float]:
    """What is kept from forward to backward, what the loss needs beside it, what a layer's backward needs."""
    tokens = trial.micro_batch * trial.max_length
    layer = tokens * layer_bytes_per_token(shape, trial, framework, width=width, device=device)
    # Gradients of a layer's feed-forward part, and of its norms in float32.
    backward = float(tokens * (3 * shape.intermediate * width + 8 * shape.hidden))
    loss = _logit_bytes(shape, trial, framework, width)
    if framework.quantizes(trial):
        # One module's weights at a time are unpacked from 4 bits.
        backward += max(linear.parameters for linear in shape.linears) * width
        loss += shape.embedding_parameters * width if framework.quantizes_head else 0
    if framework.shards > 1 and not framework.gathers_frozen:
        # The whole layer that is at work, and the next one on its way.
        stored = framework.nf4_bits / _BITS_PER_BYTE if framework.quantizes(trial) else width
        backward += 2 * (shape.linear_parameters / shape.layers) * stored
    if trial.gradient_checkpointing:
        # What is offloaded is there twice: one layer's input at work, the next one on its way.
        inputs = 2 if framework.offloads_checkpoints else shape.layers
        kept, backward = float(inputs * tokens * shape.hidden * width), backward + layer
    else:
        kept = shape.layers * layer
    if trial.method == "prefix":
        kept += shape.layers * trial.micro_batch * trial.virtual_tokens * 2 * shape.heads * shape.head_dim * width
    return kept, loss, backward


def _logit_bytes(shape: ModelShape, trial: TrialConfig, framework: Framework, width: int) -> float:
    tokens = trial.micro_batch * trial.max_length
    if framework.logit_bytes:
        return float(tokens * shape.vocab * framework.logit_bytes)
    # TRL projects tile by tile and keeps the gradient of the hidden states in float32.
    tile = min(tokens, _TILE_TOKENS) * min(shape.vocab, _TILE_VOCABULARY)
    return float(tile * (width + 4) + tokens * shape.hidden * 4)


def _gradient_bytes(
    shape: ModelShape, trial: TrialConfig, framework: Framework, trained: int, width: int, passing: float
) -> float:
    if trial.method != "full":
        return trained * width
    if framework.optimizer_in_backward:
        return max(shape.embedding_parameters, *(linear.parameters for linear in shape.linears)) * width
    if trial.accumulation > 1:
        return trained * width
    return max(0.0, trained * width - passing)
