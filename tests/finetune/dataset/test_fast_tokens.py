from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from finetune.chat.encode import EncodedRecord, RecordEncoder
from finetune.dataset import profile
from finetune.dataset.fast_tokens import FastTokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
TEXT = ["Question and answer, it's 2026!\n", "Питання та відповідь: що таке їжак?\n", "ответ 漢字 😀 é"] * 10


def train(*, llama3: bool = False, add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=not llama3)
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if llama3 else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


PAIRS = [(tokenizer, FastTokenizer.of(tokenizer)) for tokenizer in (train(), train(llama3=True))]
texts = st.lists(
    st.sampled_from([*TEXT[:3], *SPECIAL, " ", "\n\n", "'LL", "12345", "<|end", "\u00a0", "a\u0301"])
    | st.text(max_size=8)
)


@pytest.mark.parametrize(("tokenizer", "fast"), PAIRS, ids=["gpt-2", "llama 3"])
@settings(max_examples=80, deadline=None)
@given(pieces=texts)
def test_tokens_and_their_places_are_those_of_the_tokenizer(
    tokenizer: Tokenizer, fast: FastTokenizer | None, pieces: list[str]
) -> None:
    assert fast is not None
    text = "".join(pieces).encode(errors="ignore").decode()
    own = tokenizer.encode(text, add_special_tokens=False)
    [ours] = fast.encode_batch([text], add_special_tokens=False)

    assert ours.ids == own.ids
    assert [ours.offsets[token] for token in range(len(own.ids))] == own.offsets
    assert [ours.char_to_token(at) for at in range(len(text) + 1)] == [
        own.char_to_token(at) for at in range(len(text) + 1)
    ]


def shuffled_ids() -> Tokenizer:
    form = json.loads(train().to_str())
    vocabulary = form["model"]["vocab"]
    last, before = (vocabulary["".join(merge)] for merge in form["model"]["merges"][:-3:-1])
    form["model"]["vocab"] = {token: {last: before, before: last}.get(id_, id_) for token, id_ in vocabulary.items()}
    return Tokenizer.from_str(json.dumps(form))


def with_normalizer() -> Tokenizer:
    tokenizer = train()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def of_words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("make", [shuffled_ids, with_normalizer, of_words, lambda: train(add_prefix_space=True)])
def test_a_tokenizer_of_another_form_has_no_fast_counterpart(make: Callable[[], Tokenizer]) -> None:
    assert FastTokenizer.of(make()) is None


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture
def encoder(tmp_path: Path) -> RecordEncoder:
    train().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))
    return RecordEncoder.load(tmp_path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    records = [{"instruction": f"Питання {n}", "output": TEXT[n % 3] * (n % 7 + 1)} for n in range(1500)]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"text": "Plain"}]))
    return path


def test_a_profile_is_the_same_by_either_way(encoder: RecordEncoder, dataset: Path) -> None:
    fast = profile.analyze(dataset, encoder=encoder, sample_size=500)
    slow = profile.analyze(dataset, encoder=encoder, sample_size=10**9)

    told = {"tokens_compared", "tokens_differ_at_most"}
    assert fast.model_dump(exclude=told) == slow.model_dump(exclude=told)
    assert fast.tokenized_by == "tiktoken"
    assert (slow.tokens_compared, slow.tokens_differ_at_most) == (1501, 0.0)


def test_the_sample_bounds_how_many_records_could_have_other_tokens(
    encoder: RecordEncoder, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "_BATCH", 100)
    found = profile.analyze(dataset, encoder=encoder, sample_size=250)

    assert (found.tokens_compared, found.tokens_differ_at_most) == (300, 0.01)
    none = profile.analyze(dataset, encoder=encoder, sample_size=0)
    assert (none.tokens_compared, none.tokens_differ_at_most) == (0, 1.0)


def test_the_models_own_tokenizer_counts_the_sample_alone(
    encoder: RecordEncoder, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Counter[bool] = Counter()
    encode = RecordEncoder.encode

    def counting(self: RecordEncoder, records: list[dict[str, Any]]) -> list[EncodedRecord]:
        counted[isinstance(self.tokenizer, FastTokenizer)] += len(records)
        return encode(self, records)

    monkeypatch.setattr(RecordEncoder, "encode", counting)
    monkeypatch.setattr(profile, "_BATCH", 100)
    profile.analyze(dataset, encoder=encoder, sample_size=250)

    assert counted == {True: 1501, False: 300}


def test_a_fast_tokenizer_that_differs_on_the_sample_is_not_trusted(
    encoder: RecordEncoder, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = profile.analyze(dataset, encoder=encoder)
    # Another pattern: numbers are no words of their own.
    monkeypatch.setattr("finetune.dataset.fast_tokens._GPT2_PATTERN", r"\s+|\S+")
    guarded = profile.analyze(dataset, encoder=encoder)

    assert guarded.tokenized_by == "tokenizers"
    assert guarded.tokens_differ_at_most is None
    assert guarded.total_tokens == exact.total_tokens
