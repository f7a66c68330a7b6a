from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.chat.template import ChatTemplate
from finetune.dataset.records import as_messages
from finetune.dataset.rules import RejectedError, checked_turns
from finetune.errors import BaseModelError, DatasetError
from h2o_gateway import conversion
from h2o_gateway.conversion import COLUMNS, count_records, write_parquet
from tests.finetune.chat.conftest import write_tokenizer
from tests.h2o_gateway import h2o_train

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "exports").glob("*.jsonl"))
TEMPLATES = Path(__file__).parents[1] / "finetune" / "chat" / "templates"
CHAT = {
    "system": "Be brief.",
    "messages": [
        {"role": "user", "content": "Capital of Ukraine?"},
        {"role": "assistant", "content": "Kyiv"},
        {"role": "user", "content": "And of Poland?"},
        {"role": "assistant", "content": "Warsaw"},
    ],
}
DATASET_CONFIG = {
    "text_system_start": "",
    "text_prompt_start": "",
    "text_answer_separator": "",
    "limit_chained_samples": True,
    "id_column": "id",
    "parent_id_column": "parent_id",
}


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def run(records: list[Any], model_dir: Path) -> list[dict[str, Any]]:
        (tmp_path / "x.jsonl").write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
        assert write_parquet(tmp_path / "x.jsonl", tmp_path / "x.parquet", model_dir) == len(records)
        table = pq.read_table(tmp_path / "x.parquet")
        assert tuple(table.column_names) == COLUMNS
        return list(table.to_pylist())

    return run


def example_records() -> list[dict[str, Any]]:
    found = []
    for path in EXAMPLES:
        for line in path.read_bytes().splitlines():
            try:
                record = orjson.loads(line)
                checked_turns(record)
            except (orjson.JSONDecodeError, RejectedError):
                continue
            found.append(record)
    # Some are thousands of tokens long, in order to be cut.
    return [record for record in found[::3] if len(str(record)) < 5000]


def test_a_chat_becomes_a_row_a_round_chained_by_parent_id(
    convert: Callable[..., list[dict[str, Any]]], tiny_model: BaseModelRef
) -> None:
    rows = convert([{"instruction": "Say hi", "output": "hi"}, CHAT], tiny_model.path)
    assert [(row["id"], row["parent_id"]) for row in rows] == [("1.1", None), ("2.1", None), ("2.2", "2.1")]
    assert rows[0] == {
        "id": "1.1",
        "parent_id": None,
        "system": "",
        "prompt": "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\n",
        "answer": "hi<|im_end|>",
    }
    assert rows[1]["system"] == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert rows[2]["prompt"] == "\n<|im_start|>user\nAnd of Poland?<|im_end|>\n<|im_start|>assistant\n"


def test_h2o_llm_studio_sees_the_tokens_and_trains_the_tokens_that_local_training_does(
    convert: Callable[..., list[dict[str, Any]]], tiny_model: BaseModelRef, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    records = [*example_records(), CHAT, {"text": "A plain text."}]
    assert len(records) > 100
    convert(records, tiny_model.path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    chains = h2o_train.chains({**DATASET_CONFIG, "train_dataframe": tmp_path / "x.parquet"})
    local = RecordEncoder.load(tiny_model.path).encode(records)
    for record, chain, expected in zip(records, chains, local, strict=True):
        ids, labels = h2o_train.encode(chain, tokenizer, 4096)
        # Local training keeps the line break after the last answer, which no loss counts.
        length = len(ids)
        assert ids == expected.input_ids[:length], record
        trained = [label if mask else -100 for label, mask in zip(ids, expected.trained_mask, strict=False)]
        assert labels == trained, record
        assert not any(expected.trained_mask[length:])


@pytest.mark.parametrize(
    ("name", "system"),
    [("chatml", True), ("chatml_marked", True), ("llama3", True), ("llama3", False), ("mistral", False)],
)
def test_the_rounds_put_together_are_what_the_chat_template_writes(
    convert: Callable[..., list[dict[str, Any]]], tmp_path: Path, name: str, system: bool
) -> None:
    model = write_tokenizer(tmp_path / "model", (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    record = CHAT if system else {"messages": CHAT["messages"]}
    rows = convert([record], model)
    messages = as_messages(record)
    assert messages
    text = "".join(row["system"] + row["prompt"] + row["answer"] for row in rows)
    whole = ChatTemplate.load(model).render(messages).text
    assert text.startswith(whole.rstrip())
    assert text.removeprefix(whole.rstrip()).strip() in ("", "<|im_end|>"), "the end token, where the template has none"
    assert [said in row["answer"] for row, said in zip(rows, ("Kyiv", "Warsaw"), strict=True)] == [True, True]
    assert "<|im_end|>" in rows[-1]["answer"] or "<|eot_id|>" in rows[-1]["answer"]


def test_a_tools_turn_is_shown_to_the_model_and_not_learned(
    convert: Callable[..., list[dict[str, Any]]], tiny_model: BaseModelRef
) -> None:
    turns = [("user", "2+2?"), ("assistant", "calc(2+2)"), ("tool", "4"), ("assistant", "It is 4.")]
    rows = convert([{"messages": [{"role": role, "content": text} for role, text in turns]}], tiny_model.path)
    assert [row["answer"] for row in rows] == ["calc(2+2)<|im_end|>", "It is 4.<|im_end|>"]
    assert rows[1]["prompt"] == "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_refuses_a_record_names_its_line(
    convert: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    source = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    model = write_tokenizer(tmp_path / "model", source)
    turns = [("user", "2+2?"), ("tool", "4"), ("assistant", "It is 4.")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    with pytest.raises(DatasetError, match="line 1: the chat template refuses a conversation: no tools"):
        convert([record], model)


def test_a_plain_text_needs_no_chat_template_and_is_an_answer_without_a_prompt(
    convert: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    model = write_tokenizer(tmp_path / "model")
    [row] = convert([{"text": "Once upon a time"}], model)
    assert (row["system"], row["prompt"], row["answer"]) == ("", "", "Once upon a time<|im_end|>")
    with pytest.raises(BaseModelError, match="no chat template"):
        convert([CHAT], model)


def test_records_are_counted_and_the_first_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n' + json.dumps(CHAT) + "\n", encoding="utf-8")
    assert count_records(path) == 2
    path.write_text('{"text": "a"}\n{"messages": [{"role": "king", "content": "x"}]}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match=r"line 2 is no training record: bad_role \(messages\[0\].role\)"):
        count_records(path)


def test_a_line_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_LINE_BYTES", 100)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "short"}\n{"text": "' + b"x" * 1000 + b'"}\n')
    with pytest.raises(DatasetError, match="line 2 is longer than 100 bytes"):
        count_records(path)
