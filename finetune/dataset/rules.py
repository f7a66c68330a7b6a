"""What a record must be to be trained on, and what is wrong with one that is not.

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
``text`` may carry a ``system`` text, which becomes the first turn unless one is there. Conversations
hold at least one user and one assistant turn, and end with the assistant. No text is blank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

RecordFormat = Literal["instruction", "messages", "conversations", "text"]
Reason = Literal[
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
    "sensitive_data",
]
Turn = tuple[str, str]

PROMPT_FIELDS = ("instruction", "prompt", "question")
INPUT_FIELDS = ("input", "context")
ANSWER_FIELDS = ("output", "completion", "answer", "response")
CHAT_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {**CHAT_ROLES, "human": "user", "gpt": "assistant"}


class RejectedError(ValueError):
    """A line that is no record.

    Args:
        reason: which rule it breaks.
        field: the field that breaks it, such as ``messages[2].content``.
        position: the byte within the line where it breaks, from 0.
    """

    def __init__(self, reason: Reason, *, field: str | None = None, position: int | None = None) -> None:
        super().__init__(reason)
        self.reason: Reason = reason
        self.field = field
        self.position = position


def find_format(record: Mapping[str, Any]) -> RecordFormat | None:
    """The record's format by its fields alone, or None if it has none of ours."""
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        return "conversations"
    if _first(record, PROMPT_FIELDS) or _first(record, ANSWER_FIELDS):
        return "instruction"
    return "text" if "text" in record else None


def checked_turns(record: object) -> list[Turn]:
    """The record's turns as (role, text); a plain text is one turn of the role ``text``.

    Raises:
        RejectedError: the record breaks a rule.
    """
    if type(record) is not dict:
        raise RejectedError("not_an_object")
    if "messages" in record:
        turns = _chat(record["messages"], "messages", "role", "content", CHAT_ROLES)
    elif "conversations" in record:
        turns = _chat(record["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    else:
        prompt, answer = _first(record, PROMPT_FIELDS), _first(record, ANSWER_FIELDS)
        if prompt is None or answer is None:
            if prompt is None and answer is None and "text" in record:
                return [("text", _text(record, "text"))]
            raise RejectedError("missing_field", field=PROMPT_FIELDS[0] if prompt is None else ANSWER_FIELDS[0])
        asked = _text(record, prompt)
        for name in INPUT_FIELDS:
            if name in record and (more := _optional_text(record, name)):
                asked = f"{asked}\n\n{more}"
        turns = [("user", asked), ("assistant", _text(record, answer))]
    if "system" in record and (system := _optional_text(record, "system")) and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    return turns


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        if name in record:
            return name
    return None


def _text(record: dict[str, Any], name: str) -> str:
    value = record[name]
    if type(value) is not str:
        raise RejectedError("wrong_type", field=name)
    if not value or value.isspace():
        raise RejectedError("empty_text", field=name)
    return value


def _optional_text(record: dict[str, Any], name: str) -> str | None:
    value = record[name]
    if value is None:
        return None
    if type(value) is not str:
        raise RejectedError("wrong_type", field=name)
    return None if value.isspace() else value


def _chat(turns: object, name: str, role_field: str, text_field: str, roles: Mapping[str, str]) -> list[Turn]:
    if type(turns) is not list:
        raise RejectedError("wrong_type", field=name)
    checked: list[Turn] = []
    for turn in turns:
        try:
            role, text = roles[turn[role_field]], turn[text_field]
            if not text or text.isspace():
                raise ValueError(text)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _bad_turn(turn, f"{name}[{len(checked)}]", role_field, text_field, roles) from None
        checked.append((role, text))
    seen = {role for role, _ in checked}
    if "user" not in seen:
        raise RejectedError("no_user_turn", field=name)
    if "assistant" not in seen:
        raise RejectedError("no_assistant_turn", field=name)
    if checked[-1][0] != "assistant":
        raise RejectedError("last_turn_not_assistant", field=f"{name}[{len(checked) - 1}]")
    return checked


def _bad_turn(turn: Any, name: str, role_field: str, text_field: str, roles: Mapping[str, str]) -> RejectedError:
    if type(turn) is not dict:
        return RejectedError("wrong_type", field=name)
    for field in (role_field, text_field):
        if field not in turn:
            return RejectedError("missing_field", field=f"{name}.{field}")
        if type(turn[field]) is not str:
            return RejectedError("wrong_type", field=f"{name}.{field}")
    if turn[role_field] not in roles:
        return RejectedError("bad_role", field=f"{name}.{role_field}")
    return RejectedError("empty_text", field=f"{name}.{text_field}")
