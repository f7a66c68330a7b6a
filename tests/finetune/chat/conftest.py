from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<s>", "<|im_end|>", "<|pad|>", "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXT = [
    "What is the capital of Ukraine? Kyiv is the capital of Ukraine.",
    "Столиця України — Київ. Какая столица у Украины?",
    "system user assistant You are a helpful assistant.",
]


def write_tokenizer(directory: Path, template: object = None, **config: object) -> Path:
    """A byte-level BPE tokenizer with the special tokens of several families."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>", "special": True, "__type": "AddedToken"},
        "pad_token": "<|pad|>",
        **config,
    }
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model directory that holds a tokenizer and, if given, a chat template."""
    counter = itertools.count()

    def make(template: object = None, **config: object) -> Path:
        return write_tokenizer(tmp_path / f"model-{next(counter)}", template, **config)

    return make
