"""Prompts as token ids, and what Hugging Face answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.dataset.records import Message

    Prompts: TypeAlias = Sequence[list[Message]] | Sequence[str]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> list[list[int]]:
    """Token ids of prompts: conversations through the chat template up to the answer, texts as they are."""
    return [_encode(tokenizer, prompt) for prompt in prompts]


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: list[Message] | str) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # The template wrote the special tokens already.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_ids(model: PreTrainedModel) -> set[int]:
    """The tokens that end an answer."""
    ids: Any = model.generation_config.eos_token_id
    return {ids} if isinstance(ids, int) else set(ids or ())


def greedy_tokens(model: PreTrainedModel, ids: list[int], max_tokens: int) -> list[int]:
    """At most `max_tokens` most likely next tokens one after another; an answer that ends, ends in the end token."""
    import torch

    stops = stop_ids(model)
    generated: list[int] = []
    with torch.inference_mode():
        step: Any = torch.tensor([ids])
        cache = None
        for _ in range(max_tokens):
            result = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            token = int(result.logits[0, -1].argmax())
            generated.append(token)
            if token in stops:
                break
            step = torch.tensor([[token]])
    return generated
