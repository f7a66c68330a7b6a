"""What a forward pass keeps for the backward pass, counted tensor by tensor.

The way of Korthikanti et al. 2022 (section 4), for today's gated layers, and without what only the gradients
of frozen weights would need. Tests compare the count with the tensors that autograd keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from finetune.planning.framework import Framework
from finetune.planning.model_config import Linear, ModelShape, Source
from finetune.planning.models import TrialConfig

_QKV = ("q_proj", "k_proj", "v_proj")
_FUSED_QKV = ("qkv_proj", "query_key_value")


def layer_bytes_per_token(
    shape: ModelShape, trial: TrialConfig, framework: Framework, *, width: int, device: Literal["cpu", "cuda"]
) -> float:
    """Bytes that one layer keeps for each token; `width` is the bytes of a number of the base model."""
    kept = _norms(shape, trial, framework, width) + _attention(shape, trial, framework, width)
    kept += _feed_forward(shape, framework, width)
    match trial.method:
        case "full":
            # What the attention's output module is given is kept by attention itself.
            kept += width * sum(_distinct_inputs(shape.linears).values())
        case "lora" | "qlora":
            kept += _adapters(shape, trial, framework, width, device)
        case "ia3":
            *scaled, feed_forward = shape.targets(shape.ia3_modules)
            kept += width * sum(linear.outputs for linear in scaled) + 4 * feed_forward.inputs
        case "prefix":
            pass
    if framework.quantizes(trial):
        inputs = sum(_distinct_inputs(shape.linears).values()) + shape.heads * shape.head_dim
        kept += framework.kept_4bit_inputs * width * inputs
    return kept


def _norms(shape: ModelShape, trial: TrialConfig, framework: Framework, width: int) -> float:
    inputs = shape.hidden_norms * shape.hidden
    if shape.qk_norm:
        inputs += (shape.heads + shape.kv_heads) * shape.head_dim
    # RMS norms work in float32 and keep that copy of their input; layer norms keep the input.
    kept = inputs * (4 if shape.norms == "rms" and not framework.fused_kernels else width)
    if trial.method == "full" and shape.norms == "rms":
        kept += inputs * width
    return kept


def _attention(shape: ModelShape, trial: TrialConfig, framework: Framework, width: int) -> float:
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Packed records share a row, and a mask, unless each is attended to by itself.
    shared = trial.packing and (trial.attention != "sdpa" or shape.windowed)
    columns = trial.max_length * (trial.micro_batch if shared else 1)
    if trial.attention == "sdpa" and not (shape.fusable or framework.expands_kv):
        # PyTorch's plain implementation works in float32.
        return 4 * (q + 2 * kv + shape.heads * columns)
    padded = trial.micro_batch > 1 and not trial.packing
    masked = framework.masks and (padded or shared or trial.method == "prefix")
    if trial.attention == "eager":
        # The softmax in float32, its copy in the base model's precision, and the bounded scores.
        per_score = 4 + (width if width < 4 else 0) + (width if shape.softcapped else 0)
        scores = shape.heads * columns * per_score
    else:
        # Fused kernels keep the logarithm of each row's sum (Dao et al. 2022, FlashAttention, algorithm 1).
        scores = 4 * shape.heads
        if masked and trial.attention == "sdpa":
            # A row of the mask, as numbers that are added.
            scores += columns * width
    expanded = framework.expands_kv or trial.attention == "eager" or (masked and trial.attention == "sdpa")
    keys = q if expanded else kv
    values = keys
    if keys == kv and (framework.fused_qkv or any(linear.name in _FUSED_QKV for linear in shape.linears)):
        # The value is a view that keeps the fused module's whole output.
        values = q + 2 * kv
    return width * (q + keys + values + q) + scores


def _feed_forward(shape: ModelShape, framework: Framework, width: int) -> float:
    if shape.gated:
        # Both halves, and the activated one.
        return width * shape.intermediate * (2 if framework.fused_kernels else 3)
    composed = shape.composed_activation and not framework.single_operation_activations
    return width * shape.intermediate * (4 if composed else 1)


def _adapters(
    shape: ModelShape, trial: TrialConfig, framework: Framework, width: int, device: Literal["cpu", "cuda"]
) -> float:
    targets = shape.targets(trial.target_modules)
    cast = framework.cast_input_bytes if width < 4 else 0
    # A dropped element is remembered by one byte on a GPU, by its factor on a CPU.
    mask = 0 if trial.lora_dropout == 0 else 1 if device == "cuda" else 4
    if framework.fused_qkv:
        inputs = sum(_distinct_inputs(targets).values() if not mask else _fused_inputs(targets))
        kept = float(inputs * (width + mask))
        adapted = [linear.outputs for linear in targets if linear.name in _QKV]
        if 0 < len(adapted) < len(_QKV):
            # Updates of some of the three are copied into zeros for all three, and kept.
            kept += width * sum(adapted)
    elif cast or mask:
        kept = float(sum(linear.inputs for linear in targets) * ((cast or width) + mask))
    else:
        kept = float(sum(_distinct_inputs(targets).values()) * width)
    kept += trial.lora_rank * len(targets) * (cast or width)
    if trial.use_dora:
        # The outputs of the module and of its adapter, both scaled by a trained magnitude.
        kept += sum(linear.outputs for linear in targets) * (width + (cast or width))
    return kept


def _distinct_inputs(linears: Iterable[Linear]) -> dict[Source, int]:
    """Inputs that are kept once for all modules that share them; attention keeps its own output anyway."""
    return {linear.source: linear.inputs for linear in linears if linear.source != "heads"}


def _fused_inputs(linears: Iterable[Linear]) -> list[int]:
    fused = {("qkv" if linear.name in _QKV else linear.name): linear.inputs for linear in linears}
    return list(fused.values())
