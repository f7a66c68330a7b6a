from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.chat.encode import EncodedRecord, RecordEncoder
from finetune.errors import BaseModelError, DatasetError

TEMPLATES = Path(__file__).parent / "templates"
MakeModel = Callable[..., Path]

RECORDS = [
    {"instruction": "Яка столиця України?", "output": "Київ."},
    {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "  B 🙂 \n"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is the capital of Ukraine?"},
            {"role": "assistant", "content": "Kyiv."},
            {"role": "user", "content": "And of Poland?"},
            {"role": "assistant", "content": "Warsaw."},
        ]
    },
]


def template_text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def trained_text(encoder: RecordEncoder, record: EncodedRecord) -> str:
    kept = [token for token, trained in zip(record.input_ids, record.trained_mask, strict=True) if trained]
    return encoder.decode(kept, skip_special_tokens=False)


def test_the_tokens_equal_those_of_transformers(make_model: MakeModel) -> None:
    from transformers import PreTrainedTokenizerFast

    model_dir = make_model(template_text("llama3"))
    theirs = PreTrainedTokenizerFast.from_pretrained(model_dir)
    encoder = RecordEncoder.load(model_dir)
    messages = RECORDS[2]["messages"]
    expected = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert encoder.encode_prompt(messages[:-1]) == expected
    assert encoder.encode([RECORDS[2]])[0].input_ids[: len(expected)] == expected


@pytest.mark.parametrize("name", ["chatml", "chatml_marked"])
def test_the_loss_counts_the_answers_and_their_ends_alone(make_model: MakeModel, name: str) -> None:
    encoder = RecordEncoder.load(make_model(template_text(name)))
    encoded = encoder.encode(RECORDS)
    assert [trained_text(encoder, record) for record in encoded] == [
        "Київ.<|im_end|>",
        "  B 🙂 \n<|im_end|>",
        "Kyiv.<|im_end|>Warsaw.<|im_end|>",
    ]


def test_training_begins_where_the_prompt_of_evaluation_ends(make_model: MakeModel) -> None:
    encoder = RecordEncoder.load(make_model(template_text("chatml")))
    prompt = encoder.encode_prompt([{"role": "user", "content": "Яка столиця України?"}])
    record = encoder.encode(RECORDS[:1])[0]
    assert record.input_ids[: len(prompt)] == prompt
    assert record.trained_mask.index(1) == len(prompt)


def test_the_end_token_is_learned_where_the_markers_close_before_it(make_model: MakeModel) -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% endfor %}"
    encoder = RecordEncoder.load(make_model(source))
    assert trained_text(encoder, encoder.encode(RECORDS[:1])[0]).endswith("Київ.<|im_end|>")


def test_the_end_token_is_added_where_the_template_writes_none(make_model: MakeModel) -> None:
    source = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    encoder = RecordEncoder.load(make_model(source))
    assert trained_text(encoder, encoder.encode(RECORDS[:1])[0]) == "Київ.\n<|im_end|>"


def test_an_end_of_turn_that_does_not_end_generation_is_followed_by_one_that_does(make_model: MakeModel) -> None:
    encoder = RecordEncoder.load(make_model(template_text("llama3")))
    assert trained_text(encoder, encoder.encode(RECORDS[:1])[0]) == "Київ.<|eot_id|><|im_end|>"


def test_all_end_tokens_that_the_model_names_are_known(make_model: MakeModel) -> None:
    model_dir = make_model(template_text("llama3"))
    tokenizer_ends = RecordEncoder.load(model_dir).eos_token_ids
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [*tokenizer_ends, 7]}))
    assert RecordEncoder.load(model_dir).eos_token_ids == [*tokenizer_ends, 7]


def test_a_plain_text_is_trained_whole_and_ends(make_model: MakeModel) -> None:
    encoder = RecordEncoder.load(make_model())
    record = encoder.encode([{"text": "Kyiv is the capital."}])[0]
    assert trained_text(encoder, record) == "Kyiv is the capital.<|im_end|>"
    assert all(record.trained_mask)


def test_order_is_kept_when_texts_and_conversations_are_mixed(make_model: MakeModel) -> None:
    encoder = RecordEncoder.load(make_model(template_text("chatml")))
    mixed = [{"text": "one"}, RECORDS[0], {"text": "two"}]
    assert encoder.encode(mixed) == [encoder.encode([record])[0] for record in mixed]


def test_no_second_beginning_is_written(make_model: MakeModel) -> None:
    model_dir = make_model(template_text("llama3"))
    content = json.loads((model_dir / "tokenizer.json").read_text())
    begin = next(token["id"] for token in content["added_tokens"] if token["content"] == "<s>")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}},
    }
    (model_dir / "tokenizer.json").write_text(json.dumps(content))
    encoder = RecordEncoder.load(model_dir)
    chat, text = encoder.encode([RECORDS[0], {"text": "one"}])
    assert chat.input_ids.count(begin) == 1
    assert text.input_ids.count(begin) == 1


def test_a_record_that_the_template_refuses_is_named_by_its_number(make_model: MakeModel) -> None:
    encoder = RecordEncoder.load(make_model(template_text("mistral")))
    turns = [("user", "A"), ("user", "A again"), ("assistant", "B")]
    bad = {"messages": [{"role": role, "content": content} for role, content in turns]}
    with pytest.raises(DatasetError, match=r"record 2: .*roles must alternate"):
        encoder.encode([RECORDS[0], bad])


def test_a_damaged_tokenizer_gives_one_clear_error(make_model: MakeModel) -> None:
    model_dir = make_model()
    (model_dir / "tokenizer.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"tokenizer cannot be read.*tokenizer\.json"):
        RecordEncoder.load(model_dir)


def test_a_model_that_names_no_end_token_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(BaseModelError, match="never learn to stop"):
        RecordEncoder.load(make_model(eos_token=None))
