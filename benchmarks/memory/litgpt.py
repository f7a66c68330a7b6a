"""litgpt's two tables (Lightning-AI/litgpt at 26857050fe): its conventions and the settings behind each line.

Peaks are ``torch.cuda.max_memory_allocated``: no CUDA context, nothing that the allocator holds without using it.

Chosen with sight of the tables, for causes that cannot be run here any more: how many copies of its 4-bit modules'
inputs the bitsandbytes of the day kept (1 in 2023, 2 in 2024), the bytes per logit, and that FSDP does not drop frozen
parameters that it has gathered (it does so when their gradients are there). The rest is read from the program.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.memory.rows import CARDS, Row, shape_of
from finetune.planning.framework import Framework
from finetune.planning.model_config import Linear, ModelShape
from finetune.planning.models import TrialConfig

# Everything in bf16; one module for query, key and value; the head's logits in pieces that are all kept, with their
# log-softmax and both gradients: four times two bytes.
LITGPT = Framework(
    adapter_bytes=2,
    cast_input_bytes=0,
    fused_qkv=True,
    expands_kv=True,
    masks=False,
    single_operation_activations=True,
    logit_bytes=8,
    nf4_bits=4.5,
    quantizes_head=True,
    own_head=True,
    context_gb=0,
    fragmentation=0,
)
LITGPT_2023 = replace(LITGPT, kept_4bit_inputs=1)
LITGPT_2024 = replace(LITGPT, kept_4bit_inputs=2)

# Tokens of Alpaca's longest record, from the first table's own text.
LONGEST = {"phi-1.5": 1044, "StableLM Alpha": 1034, "Llama 2": 1304, "Falcon": 1079}
NAMES = {
    "StableLM Alpha": "stablelm-base-alpha-3b",
    "Falcon": "falcon-40b",
    "mistral-7b-v0.2": "mistral-7b",
    "Phi-3-mini-4k-instruct": "phi-3-mini-4k",
    "tiny-llama": "tiny-llama-1.1b",
}
QUERY_VALUE = ["q_proj", "v_proj"]
# By parameters that LoRA trains.
LLAMA_2 = {"4,194,304": "llama-2-7b", "6,553,600": "llama-2-13b"}
# Parameters that LLaMA-Adapter's second version trains.
SECOND_ADAPTER = ("2,125,248", "4,279,744")

# Rank of lora, rank of qlora, targets, dropout: config_hub/finetune/<model>/*.yaml.
HUB: dict[str, tuple[int, int, Any, float]] = {
    "gemma-2b": (8, 16, "all-linear", 0.1),
    "gemma-7b": (16, 16, "all-linear", 0.1),
    "gemma-2-2b": (8, 16, "all-linear", 0.1),
    "gemma-2-9b": (16, 16, "all-linear", 0.1),
    "phi-2": (8, 8, "all-linear", 0.05),
    "phi-3-mini-4k": (8, 8, "all-linear", 0.05),
    "tiny-llama-1.1b": (32, 32, "all-linear", 0.05),
}
HUB_DEFAULT: tuple[int, int, Any, float] = (32, 32, QUERY_VALUE, 0.05)
# The table calls Gemma's second generation by the first one's name; the files named beside it tell them apart.
SECOND_GENERATION = ("runtime 11.96 min", "runtime 16.06 min")
BELOW_ITS_OWN_STATES = ("llama-3.2-1b", "llama-3.2-3b", "phi-3-mini-4k")


def row_of(line: dict[str, str]) -> Row:
    """A line of either table."""
    name, trial, framework, reason = (_tutorial if "resource-tables" in line["source"] else _hub)(line)
    return Row(
        source=line["source"],
        name=f"{line['model']}, {line['method'].removeprefix('Finetuning with ')}, {line['micro_batch']} a pass, "
        f"{line['gpus']}",
        measured=None if line["peak"] == "OOM" else float(line["peak"]),
        shape=_one_module(shape_of(name)),
        trial=trial,
        framework=framework,
        limit_gb=CARDS["A10G" if "A10G" in line["gpus"] else "A100-40G"],
        reason=reason,
    )


def _one_module(shape: ModelShape) -> ModelShape:
    """Query, key and value by their own names, whatever the model calls them: litgpt adapts them one by one."""
    widths = {"q_proj": shape.heads * shape.head_dim}
    widths["k_proj"] = widths["v_proj"] = shape.kv_heads * shape.head_dim
    linears: list[Linear] = []
    for linear in shape.linears:
        if linear.name in ("query_key_value", "qkv_proj"):
            linears += [Linear(name, linear.inputs, width, linear.bias) for name, width in widths.items()]
        else:
            linears.append(linear)
    return replace(shape, linears=tuple(linears))


def _tutorial(line: dict[str, str]) -> tuple[str, TrialConfig, Framework, str]:
    trained = line["notes"].removeprefix("trainable=")
    name = NAMES.get(line["model"], line["model"])
    if line["model"] == "Llama 2":
        name = LLAMA_2.get(trained, "llama-2-7b")
    kind, _, quantization = line["method"].partition("; quant=")
    gpus = int(line["gpus"].split(" x ")[0])
    framework = replace(
        LITGPT_2023,
        shards=gpus,
        gathers_frozen=gpus > 1,
        nf4_bits=4.127 if quantization.endswith("dq") else 4.5,
        quantizes_base=quantization != "None",
    )
    adapter = "Adapter" in kind
    trial = TrialConfig(
        trial_id="",
        # LLaMA-Adapter learns ten virtual tokens a layer.
        method="prefix" if adapter else "lora",
        virtual_tokens=10,
        lora_rank=8,
        lora_dropout=0.05,
        target_modules=QUERY_VALUE,
        micro_batch=int(line["micro_batch"]),
        max_length=LONGEST[line["model"]],
        precision="bf16",
        gradient_checkpointing=gpus > 1,
    )
    second = adapter and trained in SECOND_ADAPTER
    reason = "LLaMA-Adapter v2 trains scales and biases of all modules: no method of the plan" if second else ""
    return name, trial, framework, reason


def _hub(line: dict[str, str]) -> tuple[str, TrialConfig, Framework, str]:
    name = NAMES.get(line["model"], line["model"])
    if line["notes"].startswith(SECOND_GENERATION):
        name = "gemma-2-2b"
    lora, qlora, targets, dropout = HUB.get(name, HUB_DEFAULT)
    full, gpus = line["method"] == "full", int(line["gpus"].split("x")[0])
    # The settings name one GPU for all but full fine-tuning, and for TinyLlama there too.
    shards = gpus if full and name != "tiny-llama-1.1b" else 1
    trial = TrialConfig.model_validate(
        {
            "trial_id": "",
            "method": line["method"],
            "lora_rank": qlora if line["method"] == "qlora" else lora,
            "lora_dropout": dropout,
            "target_modules": targets,
            "micro_batch": int(line["micro_batch"]),
            "max_length": int(line["seq_len"]),
            "precision": "bf16",
            "accumulation": 8,
            # A bound on attention's scores needs them as tensors.
            "attention": "eager" if name.startswith("gemma-2-") else "sdpa",
        }
    )
    reason = ""
    if shards > 1:
        reason = "sharded by a policy that was not published"
    elif full and name in BELOW_ITS_OWN_STATES:
        reason = "less than weights, gradients and states (8 bytes a parameter) of the settings that are published"
    return name, trial, replace(LITGPT_2024, shards=shards), reason
