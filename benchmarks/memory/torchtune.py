"""torchtune's two tables (pytorch/torchtune at bd2a0fc7c3, README.md): its conventions and the settings of each line.

Peaks are PyTorch's own, in GiB. Chosen with sight of the tables: the bytes per logit, that paged optimizer states stay
on the larger card and leave the smaller, and that LoRA's activations are checkpointed on the smaller card alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.memory.rows import Row, shape_of
from finetune.planning.framework import Framework
from finetune.planning.models import TrialConfig

GIB = 1.073741824
# Everything in bf16; logits in bf16 and float32, their log-softmax and its gradient.
TORCHTUNE = Framework(
    adapter_bytes=2,
    cast_input_bytes=0,
    expands_kv=True,
    masks=False,
    single_operation_activations=True,
    logit_bytes=14,
    context_gb=0,
    fragmentation=0,
)
# The compiled loss reads the logits in bf16 as they are.
COMPILED = replace(TORCHTUNE, fused_kernels=True, logit_bytes=12)
# An eighth of the logits at a time.
CHUNKED = replace(COMPILED, logit_bytes=14 / 8)
SHARDED = replace(CHUNKED, shards=8)
IN_BACKWARD = replace(CHUNKED, optimizer_in_backward=True)
OFFLOADED = replace(CHUNKED, offloads_checkpoints=True)
OFFLOADED_IN_BACKWARD = replace(IN_BACKWARD, offloads_checkpoints=True)

NAMES = {
    "Llama 3.1 8B": "llama-3.1-8b",
    "Llama 3.1 70B": "llama-3.1-70b",
    "Llama 3.1 405B": "llama-3.1-405b",
    "Llama 3.2 3B": "llama-3.2-3b",
}
# The recipes' own: recipes/configs/llama3_1/*.yaml and llama3_2/*.yaml.
RANKS = {"llama-3.2-3b": 64, "llama-3.1-8b": 8, "llama-3.1-70b": 16, "llama-3.1-405b": 16}
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEPT: dict[str, Any] = {"gradient_checkpointing": False}
LORA, QLORA = {"method": "lora"}, {"method": "qlora"}
LINES: dict[str, tuple[dict[str, Any], Framework]] = {
    "full (1x4090)": ({"optimizer": "sgd"}, IN_BACKWARD),
    "full (1xA6000)": ({"optimizer": "adamw_8bit"}, IN_BACKWARD),
    "LoRA (1x4090)": (LORA, CHUNKED),
    "LoRA (1xA6000)": (LORA | KEPT, CHUNKED),
    "QLoRA (1x4090)": (QLORA, CHUNKED),
    "full 8xA100 CPU offload, per GPU": ({}, SHARDED),
    "LoRA 8xA100 per GPU": (LORA, SHARDED),
    "QLoRA 8xA100 per GPU": (QLORA, SHARDED),
    "baseline full bf16": (KEPT, TORCHTUNE),
    "+packed": (KEPT, TORCHTUNE),
    "+compile": (KEPT, COMPILED),
    "+chunked CE": (KEPT, CHUNKED),
    "+act ckpt": ({}, CHUNKED),
    "+opt in bwd": ({}, IN_BACKWARD),
    "+act offload": ({}, OFFLOADED_IN_BACKWARD),
    "+8bit AdamW": ({"optimizer": "adamw_8bit"}, OFFLOADED_IN_BACKWARD),
    "LoRA": (LORA, OFFLOADED),
    "QLoRA": (QLORA, OFFLOADED),
}
LEFT_OUT = {
    "full 8xA100 CPU offload, per GPU": "parameters and states wait in the host's memory",
    "baseline full bf16": "not packed, and the lengths of its batches are not published",
}


def row_of(line: dict[str, str]) -> Row:
    """A line of either table."""
    name, method = NAMES[line["model"]], line["method"]
    settings, framework = LINES[method]
    trial = {
        "trial_id": "",
        "method": "full",
        "lora_rank": RANKS[name],
        "target_modules": TARGETS,
        "micro_batch": int(line["micro_batch"]),
        "accumulation": 1,
        "max_length": int(line["seq_len"].split()[0]),
        "precision": "bf16",
        "gradient_checkpointing": True,
    }
    return Row(
        source=line["source"],
        name=f"{line['model']}, {method}, {line['micro_batch']} a pass",
        measured=float(line["peak"]) * GIB,
        shape=shape_of(name),
        trial=TrialConfig.model_validate(trial | settings),
        framework=framework,
        reason=LEFT_OUT.get(method, ""),
    )
