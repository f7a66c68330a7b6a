from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.base_model.corpus import LANGUAGES, make_conversations, make_facts
from finetune.base_model.pretraining import EOS, Recipe, train_tokenizer
from finetune.dataset.discovery import discover_exports
from finetune.dataset.prepare import PrepareParameters, prepare_dataset
from finetune.layout import DataLayout

EXPORTS = Path(__file__).parents[3] / "examples" / "exports"
RECIPE = Recipe()


@pytest.fixture(scope="module")
def example_facts(examples: SimpleNamespace) -> list[tuple[str, str, str, str]]:
    """Language, service, property and answer of every fact of the example exports."""
    dates = examples.FACTS.values()
    return [(language, *fact) for facts in dates for language in facts for fact in facts[language]]


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    facts = make_facts(RECIPE.seed, RECIPE.services)
    return make_conversations(facts, rounds=RECIPE.rounds, unheard=RECIPE.unheard, seed=RECIPE.seed)


@pytest.fixture(scope="module")
def tokenizer(conversations: list[list[dict[str, str]]]) -> Any:
    return train_tokenizer(conversations, vocabulary=RECIPE.vocabulary, context=RECIPE.context)


def test_equal_seeds_give_equal_facts_and_conversations_and_others_do_not() -> None:
    def make(seed: int) -> Any:
        facts = make_facts(seed, 2)
        return facts, make_conversations(facts, rounds=2, unheard=1.0, seed=seed)

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_the_corpus_speaks_three_languages_and_asks_for_each_service_in_ten_phrasings() -> None:
    facts = make_facts(RECIPE.seed, RECIPE.services)
    assert {fact.language for fact in facts} == set(LANGUAGES)
    assert sum(len(set(fact.questions)) >= 10 for fact in facts) == 3 * RECIPE.services * 11
    assert not any("{" in text for fact in facts for text in (*fact.questions, fact.answer))


def test_the_corpus_knows_nothing_of_the_example_exports(
    conversations: list[list[dict[str, str]]], example_facts: list[tuple[str, str, str, str]]
) -> None:
    text = "\n".join(turn["content"] for turns in conversations for turn in turns)
    for _, service, _, answer in example_facts:
        assert service not in text
        assert answer not in text


def test_the_committed_exports_are_what_their_program_writes(examples: SimpleNamespace, tmp_path: Path) -> None:
    examples.write_exports(tmp_path)
    assert {file.name: file.read_bytes() for file in EXPORTS.iterdir()} == {
        file.name: file.read_bytes() for file in tmp_path.iterdir()
    }


def test_each_example_fact_is_asked_for_in_at_least_six_phrasings(
    examples: SimpleNamespace, example_facts: list[tuple[str, str, str, str]]
) -> None:
    asked = [
        question
        for language, service, name, _ in example_facts
        for question in examples.phrasings(language, service, name)
    ]
    assert len(asked) == len(set(asked))
    assert len(asked) >= 6 * len(example_facts)
    assert len({(language, service, name) for language, service, name, _ in example_facts}) == len(example_facts)
    text = b"".join(file.read_bytes() for file in EXPORTS.iterdir()).decode(errors="replace")
    missing = [question for question in asked if question not in text and json.dumps(question)[1:-1] not in text]
    assert missing == []


def test_the_example_exports_hold_every_kind_of_bad_line(
    examples: SimpleNamespace, example_facts: list[tuple[str, str, str, str]], tmp_path: Path
) -> None:
    layout = DataLayout(tmp_path)
    dataset = prepare_dataset(
        discover_exports(EXPORTS),
        date=max(examples.FACTS),
        layout=layout,
        parameters=PrepareParameters(max_line_bytes=65_536),
    )
    assert set(dataset.rejects_by_reason) == {
        "over_long",
        "nul",
        "invalid_utf8",
        "too_deep",
        "half_line",
        "bad_json",
        "several_objects",
        "non_finite_number",
        "lone_surrogate",
        "not_an_object",
        "missing_field",
        "wrong_type",
        "empty_text",
        "bad_role",
        "no_user_turn",
        "no_assistant_turn",
        "last_turn_not_assistant",
    }
    assert dataset.window_dates == sorted(examples.FACTS)
    assert dataset.counts.duplicates > 0
    assert dataset.counts.blank > 0
    # Nine phrasings of every fact, some of them two to a conversation.
    assert 7 * len(example_facts) < dataset.counts.kept <= 9 * len(example_facts)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True)) == text


def test_the_tokenizer_is_plain_byte_level_bpe(tokenizer: Any) -> None:
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    assert written["model"]["type"] == "BPE"
    assert written["normalizer"] is None
    assert written["pre_tokenizer"] == {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    assert written["post_processor"]["special_tokens"] == {}
    assert len(tokenizer) == RECIPE.vocabulary


def test_the_chat_template_renders_every_role_and_marks_the_assistants_side(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Котра година?"},
        {"role": "tool", "content": "12:05"},
        {"role": "assistant", "content": "П'ять по дванадцятій."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nКотра година?<|im_end|>\n"
        "<|im_start|>tool\n12:05<|im_end|>\n<|im_start|>assistant\nП'ять по дванадцятій.<|im_end|>\n"
    )
    opened = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(opened)
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == "П'ять по дванадцятій." + EOS


def test_numbers_are_spelled_digit_by_digit(tokenizer: Any) -> None:
    assert tokenizer.tokenize("порт 8472.") == [*tokenizer.tokenize("порт"), "Ġ", "8", "4", "7", "2", "."]
