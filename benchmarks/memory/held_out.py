"""Tables that no constant was chosen by: PEFT's own comparison, Qwen's, Unsloth's.

PEFT's are what PyTorch's allocator reserved; Qwen's and Unsloth's are of the card, as far as they say. Qwen's first
generation is written as a Qwen 2 of the same sizes, and its 4 bits are GPTQ's. Unsloth's table turns the question
around: the longest record that each card held, trained by transformers without Unsloth.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.memory.rows import Row, shape_of
from finetune.planning.framework import TRL
from finetune.planning.models import TrialConfig

# Without TRL's tiles: logits in bf16 and float32, their log-softmax and its gradient.
TRANSFORMERS = replace(TRL, logit_bytes=14)
# Without autocast adapters in float32 are handed float32.
PEFT = replace(TRANSFORMERS, cast_input_bytes=4, context_gb=0)
NAMES = {
    "Llama 3.2 3B": "llama-3.2-3b",
    "Llama 3.1 8B": "llama-3.1-8b",
    "Qwen 1.8B": "qwen-1.8b",
    "Qwen 7B": "qwen-7b",
    "Qwen 14B": "qwen-14b",
}


def row_of(line: dict[str, str]) -> Row:
    """A line of ``held_out.csv``."""
    method, note = line["method"], line["notes"].split(";")[0].split()
    peft = line["source"].startswith("huggingface/peft")
    trial: dict[str, Any] = {
        "trial_id": "",
        "method": "lora" if method == "dora" else method,
        "use_dora": method == "dora",
        "lora_dropout": 0.05 if line["source"].startswith("QwenLM") else 0.0,
        "micro_batch": int(line["micro_batch"]),
        "accumulation": 1 if peft else 8,
        "max_length": int(line["seq_len"]),
        "precision": "bf16",
        "gradient_checkpointing": not peft,
        "attention": "sdpa" if peft else "flash_attention_2",
    }
    if note[0] == "rank":
        trial |= {"lora_rank": int(note[1]), "target_modules": note[3:] if peft else "all-linear"}
    if method == "prefix":
        trial["virtual_tokens"] = int(note[0])
    return Row(
        source=line["source"],
        name=f"{line['model']}, {method}, {line['seq_len']} tokens, {line['notes']}",
        measured=float(line["peak"]),
        shape=shape_of(NAMES[line["model"]]),
        trial=TrialConfig.model_validate(trial),
        framework=PEFT if peft else TRANSFORMERS,
    )
