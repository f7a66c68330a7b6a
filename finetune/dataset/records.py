"""The four shapes of a training record, seen as one: a conversation, or a plain text.

=================  ==========================================================================
format             fields
=================  ==========================================================================
``messages``       ``messages``: turns of ``role`` (system, user, assistant, tool) and ``content``
``conversations``  ``conversations``: ShareGPT's turns of ``from`` (human, gpt, ...) and ``value``
``instruction``    a prompt (``instruction``, ``prompt`` or ``question``), optionally ``input`` and
                   ``context``, and an answer (``output``, ``completion``, ``answer`` or ``response``)
``text``           ``text``, and none of the above
=================  ==========================================================================

The first row that fits decides; of several names for one thing the first one listed is used. All but
``text`` may carry a ``system`` text, which becomes the first turn unless one is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from finetune.errors import DatasetError

RecordFormat = Literal["instruction", "messages", "conversations", "text"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


PROMPT_FIELDS = ("instruction", "prompt", "question")
INPUT_FIELDS = ("input", "context")
ANSWER_FIELDS = ("output", "completion", "answer", "response")
ROLES = frozenset({"system", "user", "assistant", "tool"})
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def first_field(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of `names` that the record has."""
    for name in names:
        if name in record:
            return name
    return None


def find_format(record: Mapping[str, Any]) -> RecordFormat | None:
    """The record's format by its fields alone, or None if it has none of ours."""
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        return "conversations"
    if first_field(record, PROMPT_FIELDS + ANSWER_FIELDS):
        return "instruction"
    return "text" if "text" in record else None


def record_format(record: Mapping[str, Any]) -> RecordFormat:
    """The record's format.

    Raises:
        DatasetError: the record has none of the known fields.
    """
    found = find_format(record)
    if found is None:
        raise DatasetError(
            f"no training text in a record with the fields {', '.join(sorted(record)) or '(none)'}",
            remedy="Give it instruction and output, prompt and completion, messages, conversations, or text",
        )
    return found


def as_messages(record: Mapping[str, Any]) -> list[Message] | None:
    """The record as turns of a conversation, or None for a plain text.

    Instruction, input and context become one user turn, with an empty line between them.

    Args:
        record: a record that validation kept.

    Raises:
        DatasetError: the record has none of the known fields.
    """
    found = record_format(record)
    if found == "text":
        return None
    if found == "messages":
        turns = [Message(role=turn["role"], content=turn["content"]) for turn in record["messages"]]
    elif found == "conversations":
        turns = [Message(role=SHAREGPT_ROLES[turn["from"]], content=turn["value"]) for turn in record["conversations"]]
    else:
        asked = [record[name] for name in PROMPT_FIELDS if name in record][:1]
        asked += [record[name] for name in INPUT_FIELDS if record.get(name)]
        answer = next(record[name] for name in ANSWER_FIELDS if name in record)
        turns = [Message(role="user", content="\n\n".join(asked)), Message(role="assistant", content=answer)]
    if record.get("system") and turns[0]["role"] != "system":
        turns.insert(0, Message(role="system", content=record["system"]))
    return turns


def prompt_text(record: Mapping[str, Any]) -> str:
    """What the record asks: its first user turn, or all of a plain text."""
    turns = as_messages(record)
    if turns is None:
        return str(record["text"])
    return next(turn["content"] for turn in turns if turn["role"] == "user")


def source_of(record: Mapping[str, Any]) -> str | None:
    """Where the record says it comes from: ``source``, or ``source`` within ``meta``."""
    meta = record.get("meta")
    value = record.get("source") or (meta.get("source") if isinstance(meta, Mapping) else None)
    return value if isinstance(value, str) else None
