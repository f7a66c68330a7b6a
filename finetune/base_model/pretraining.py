"""Makes the embedded base model: a tokenizer and a tiny Llama, trained on the corpus from nothing."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.base_model.corpus import Conversation, make_conversations, make_facts
from finetune.progress import Progress, ProgressEvent

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, TURN = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
_IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the embedded model is; its hash names the cached directory."""

    format: int = 1
    seed: int = 20260601
    services: int = 4
    rounds: int = 50
    unheard: float = 1.0
    vocabulary: int = 2048
    # Rows of K-quants are blocks of 256 weights, so both sizes are multiples of 256.
    hidden: int = 256
    intermediate: int = 512
    layers: int = 3
    heads: int = 4
    context: int = 1024
    batch: int = 32
    learning_rate: float = 3e-3


def chat_template() -> str:
    """The Jinja template of a conversation, with ``{% generation %}`` around the assistant's side."""
    return files("finetune.base_model").joinpath("chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")


def train_tokenizer(conversations: list[Conversation], *, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with GPT-2's pre-tokenization, which llama.cpp knows as ``gpt-2``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Without digits no two of them are merged: numbers are spelled, and learnt, digit by digit.
    texts = (
        re.sub(r" ?[0-9]+", "", text)
        for turns in conversations
        for turn in turns
        for text in (turn["role"], turn["content"])
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        model_max_length=context,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(),
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model of the recipe's sizes."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    special = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(BOS),
        "eos_token_id": tokenizer.convert_tokens_to_ids(EOS),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        initializer_range=0.04,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, **special)
    return model


def _batches(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerFast, batch: int, rng: random.Random
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of similar length in a random order: token ids and, where trained on, labels."""
    import torch

    encoded = tokenizer.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding=False
    )
    rows = sorted(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True), key=lambda row: len(row[0]))
    batches = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(len(ids) for ids, _ in part)
        ids = torch.full((len(part), width), tokenizer.pad_token_id)
        labels = torch.full((len(part), width), _IGNORED)
        for row, (tokens, mask) in enumerate(part):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(tokens)] = torch.tensor(
                [token if trained else _IGNORED for token, trained in zip(tokens, mask, strict=True)]
            )
        batches.append((ids, labels))
    rng.shuffle(batches)
    return batches


def pretrain(recipe: Recipe, directory: Path, *, on_progress: Progress) -> dict[str, float]:
    """Train tokenizer and model by the recipe and save both into `directory`.

    Losses are taken on the assistant's side alone. Right padding needs no attention mask under causal
    attention: what is padded comes after everything that a loss is taken on.

    Returns:
        ``parameters``, ``tokens``, ``steps`` and the last ``loss`` in nats per token.
    """
    import torch
    from torch.nn.functional import cross_entropy

    facts = make_facts(recipe.seed, recipe.services)
    conversations = make_conversations(facts, rounds=recipe.rounds, unheard=recipe.unheard, seed=recipe.seed)
    on_progress(ProgressEvent("corpus", len(conversations), len(conversations), "conversations"))
    tokenizer = train_tokenizer(conversations, vocabulary=recipe.vocabulary, context=recipe.context)
    rng = random.Random(recipe.seed)  # noqa: S311 - must repeat, need not be secret
    batches = _batches(conversations, tokenizer, recipe.batch, rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = new_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=len(batches), pct_start=0.05, final_div_factor=100
    )
    model.train()
    tokens, smooth = 0, 0.0
    for step, (ids, labels) in enumerate(batches, start=1):
        wanted = labels[:, 1:] != _IGNORED
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[wanted]
        loss = cross_entropy(model.lm_head(hidden), labels[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        tokens += ids.numel()
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 10 == 0 or step == len(batches):
            on_progress(ProgressEvent("pre-training", step, len(batches), "steps", {"loss": smooth}))
    model.eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"parameters": model.num_parameters(), "tokens": tokens, "steps": len(batches), "loss": smooth}
