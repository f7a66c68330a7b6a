"""Greedy answers, many prompts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.chat.encode import RecordEncoder

if TYPE_CHECKING:
    from torch.nn import Module

_PROMPTS_AT_A_TIME = 32


def greedy_answers(
    model: Module, encoder: RecordEncoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[str]:
    """The most probable continuation of each prompt, up to an end token or `max_new_tokens`.

    Args:
        model: a causal language model of transformers, with or without an adapter of PEFT.
        encoder: names the end tokens and turns tokens into text.
        prompts: token ids of each prompt.
        max_new_tokens: where an answer that does not end is cut.
    """
    import torch
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    configuration = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=encoder.eos_token_ids,
        pad_token_id=encoder.pad_token_id,
    )
    answers = []
    for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
        batch = prompts[start : start + _PROMPTS_AT_A_TIME]
        width = max(len(prompt) for prompt in batch)
        # Padding stands left, so that every answer begins where the batch ends.
        ids = torch.tensor([[encoder.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in batch])
        attention = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids.to(device), attention_mask=attention.to(device), generation_config=configuration
            )
        answers += [encoder.decode(row[width:]).strip() for row in made.tolist()]
    return answers
