"""From exported records to the table that H2O LLM Studio reads.

=============  ==================================================================================
column         content
=============  ==================================================================================
``id``         ``<line>.<round>``, both from 1
``parent_id``  the round before it in the same conversation, null in the first
``system``     the system turn, as the base model's chat template writes it; empty where there is none
``prompt``     everything else that the template writes up to the assistant's answer
``answer``     the assistant's answer and the token that ends it
=============  ==================================================================================

H2O LLM Studio puts fixed texts around its columns, with which not every chat template can be spelt. So the
columns hold the template's own text, and the configuration leaves H2O's texts empty: put together, the
rounds of a conversation are what the template writes, and the loss counts the assistant's part, as in
local training. A tool's turn is shown to the model, not said by it: it is part of the next round's
prompt, in the template's words. A plain text is an answer without a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from finetune.chat.encode import RecordEncoder
from finetune.dataset.records import Message, as_messages
from finetune.dataset.rules import RejectedError, checked_turns
from finetune.errors import DatasetError

if TYPE_CHECKING:
    from finetune.chat.template import ChatTemplate

COLUMNS = ("id", "parent_id", "system", "prompt", "answer")
_ROWS_AT_A_TIME = 4096
# A line is held in memory.
_LINE_BYTES = 64 << 20

Row = dict[str, str | None]


def count_records(path: Path) -> int:
    """Check every line of a dataset, and count them.

    Raises:
        DatasetError: a line is no record, or there is none at all.
    """
    count = sum(1 for _ in _records(path))
    if not count:
        raise DatasetError("the dataset has no records", remedy="Upload a JSONL file with one record a line")
    return count


def write_parquet(jsonl: Path, parquet: Path, model_dir: Path) -> int:
    """Convert a dataset for one base model; returns the number of conversations.

    Args:
        jsonl: the dataset.
        parquet: the table to write.
        model_dir: the base model's tokenizer and chat template, in Hugging Face's layout.

    Raises:
        DatasetError: a line is no record, or the template refuses it, such as one with a tool's turn.
        BaseModelError: the tokenizer or the chat template cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoder = RecordEncoder.load(model_dir)
    ends = [encoder.decode([token], skip_special_tokens=False) for token in encoder.eos_token_ids]
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    count = 0
    with pq.ParquetWriter(parquet, schema) as writer:
        waiting: list[Row] = []
        for number, record in _records(jsonl):
            waiting += _rows(number, record, encoder, ends)
            count += 1
            if len(waiting) >= _ROWS_AT_A_TIME:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema))
    return count


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records and their line numbers from 1; blank lines are passed over."""
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LINE_BYTES + 1), b""), start=1):
            if len(line) > _LINE_BYTES:
                raise DatasetError(f"line {number} is longer than {_LINE_BYTES} bytes")
            if line.isspace():
                continue
            try:
                record = orjson.loads(line)
                checked_turns(record)
            except orjson.JSONDecodeError as error:
                raise DatasetError(f"line {number} is no JSON object: {error}") from error
            except RejectedError as error:
                field = f" ({error.field})" if error.field else ""
                raise DatasetError(f"line {number} is no training record: {error.reason}{field}") from error
            yield number, record


def _rows(number: int, record: dict[str, Any], encoder: RecordEncoder, ends: list[str]) -> list[Row]:
    messages = as_messages(record)
    if messages is None:
        return [_row(number, 1, "", "", _ended(record["text"], "", ends))]
    try:
        rendered = encoder.template.render(messages)
    except DatasetError as error:
        raise DatasetError(f"line {number}: {error.what}", where=error.where, remedy=error.remedy) from error
    text, position = rendered.text, 0
    system = _system(messages, text, encoder.template)
    rows = []
    for turn, (start, stop) in enumerate(rendered.assistant_spans, start=1):
        prompt = text[position:start]
        answer = text[start:stop]
        if turn == len(rendered.assistant_spans):
            answer = _ended(answer, text[stop:], ends)
        rows.append(_row(number, turn, system if turn == 1 else "", prompt.removeprefix(system), answer))
        position = stop
    return rows


def _row(number: int, turn: int, system: str, prompt: str, answer: str) -> Row:
    parent = f"{number}.{turn - 1}" if turn > 1 else None
    return {"id": f"{number}.{turn}", "parent_id": parent, "system": system, "prompt": prompt, "answer": answer}


def _system(messages: list[Message], text: str, template: ChatTemplate) -> str:
    """What the template writes for the system turn alone; empty where that cannot be told from the rest."""
    if messages[0]["role"] != "system":
        return ""
    try:
        head = template.render(messages[:1]).text
    except DatasetError:
        return ""
    return head if text.startswith(head) else ""


def _ended(answer: str, rest: str, ends: list[str]) -> str:
    """The last answer, up to the token that ends it; with that token, should the template write none."""
    # Some templates close their markers before the end token, some after the line break that follows it.
    bare = answer.rstrip()
    if bare.endswith(tuple(ends)):
        return bare
    following = next((end for end in ends if rest.startswith(end)), ends[0])
    return answer + following
