"""Records that validation kept, read as conversations.

`finetune.dataset.rules` says what the formats are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from finetune.dataset.rules import RecordFormat, RejectedError, Turn, checked_turns, find_format
from finetune.errors import DatasetError


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


def record_format(record: Mapping[str, Any]) -> RecordFormat:
    """The record's format: ``instruction``, ``messages``, ``conversations`` or ``text``.

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

    Raises:
        DatasetError: the record breaks a rule, which no record of a prepared dataset does.
    """
    turns = _turns(record)
    if turns[0][0] == "text":
        return None
    return [Message(role=role, content=content) for role, content in turns]


def prompt_text(record: Mapping[str, Any]) -> str:
    """What the record asks: its first user turn, or all of a plain text.

    Raises:
        DatasetError: the record breaks a rule.
    """
    return next(content for role, content in _turns(record) if role in ("user", "text"))


def source_of(record: Mapping[str, Any]) -> str | None:
    """Where the record says it comes from: ``source``, or ``source`` within ``meta``."""
    meta = record.get("meta")
    value = record.get("source") or (meta.get("source") if isinstance(meta, Mapping) else None)
    return value if isinstance(value, str) else None


def _turns(record: Mapping[str, Any]) -> list[Turn]:
    try:
        return checked_turns(record if type(record) is dict else dict(record))
    except RejectedError as error:
        raise DatasetError(
            f"not a training record: {error.reason}" + (f" ({error.field})" if error.field else ""),
            remedy="Take records from a prepared dataset, or prepare these first",
        ) from error
