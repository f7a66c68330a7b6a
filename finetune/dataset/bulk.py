"""Records that are plainly good, many at a time: no string is made of a text.

msgspec checks the syntax of a line, but for what `finetune.dataset.unusual` rules out, and hands out each text as the
JSON literal that stands there; all literals' escapes are resolved at once. Whatever is not plainly good is left to be
looked at one by one, by `finetune.dataset.scan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from msgspec import UNSET, Raw, UnsetType

from finetune.dataset.normalization import NO_UTF8, Contents, Hashes, Texts
from finetune.dataset.rules import SHAREGPT_ROLES
from finetune.dataset.unusual import Bytes, Flags, Places

_ROLES = {name: role.encode() for name, role in SHAREGPT_ROLES.items()}
_SYSTEM, _USER, _ASSISTANT, _TEXT = b"system", b"user", b"assistant", b"text"
_PROMPT_ROLES = (_USER, _TEXT)
_QUOTE = ord('"')
# What an escaped character stands for.
_ESCAPED = np.arange(256, dtype=np.uint8)
_ESCAPED[list(b"bfnrt")] = list(b"\b\f\n\r\t")
# The first bytes of texts that are not blank: of those that are usual all but controls and C2 and E2, under which white
# space stands among others.
_VISIBLE = np.zeros(256, np.bool_)
_VISIBLE[[*range(0x21, 0x7F), *range(0xC3, 0xCC), *range(0xCE, 0xD6), *range(0xE4, 0xEA), 0xF0]] = True
_ABSENT = (b"null", b'""')


class _Turn(msgspec.Struct, gc=False):
    role: Literal["system", "user", "assistant", "tool"]
    content: Raw


class _SharedTurn(msgspec.Struct, gc=False, rename={"role": "from", "content": "value"}):
    role: Literal["system", "user", "assistant", "tool", "human", "gpt"]
    content: Raw


class _Record(msgspec.Struct, gc=False):
    messages: list[_Turn] | UnsetType = UNSET
    conversations: list[_SharedTurn] | UnsetType = UNSET
    instruction: Raw = Raw()
    prompt: Raw = Raw()
    question: Raw = Raw()
    input: Raw = Raw()
    context: Raw = Raw()
    output: Raw = Raw()
    completion: Raw = Raw()
    answer: Raw = Raw()
    response: Raw = Raw()
    system: Raw = Raw()
    text: Raw = Raw()


_decode = msgspec.json.Decoder(_Record).decode


def plain_records(lines: Sequence[bytes], numbers: Sequence[int]) -> tuple[Places, Hashes]:
    """Which of the usual lines are records beyond doubt, and their hashes.

    Args:
        lines: each with its line feed.
        numbers: those of usual lines (see `finetune.dataset.unusual`), in their order.

    Returns:
        Their numbers, in their order, and as many hashes.
    """
    plain: list[int] = []
    # Roles and literals in turn; of each record the number of its first role.
    parts: list[bytes | Raw] = []
    first: list[int] = []
    for number in numbers:
        try:
            turns = _turns(_decode(lines[number]))
        except (msgspec.MsgspecError, ValueError):
            continue
        plain.append(number)
        first.append(len(parts))
        parts += turns
    if not plain:
        return np.empty(0, np.int64), Contents().hashes()
    literals, quoted = _resolved(parts)
    texts, begins = Texts(literals, len(parts)), np.array(first)
    prompts = 2 * np.flatnonzero([role in _PROMPT_ROLES for role in parts[::2]])
    found = texts.hashes(begins, prompts[np.searchsorted(prompts, begins)] + 1)
    whole = np.logical_and.reduceat(quoted & _visible(texts.beginnings(slice(1, None, 2), 3)), begins // 2)
    return np.array(plain)[whole], Hashes(found.contents[whole], found.prompts[whole])


def _turns(record: _Record) -> list[bytes | Raw]:
    """As `finetune.dataset.rules.checked_turns`, as roles and literals in turn; these may be no texts, or blank ones.

    Raises:
        ValueError: the record may break a rule.
    """
    if record.messages is not UNSET:
        turns = _chat(record.messages)
    elif record.conversations is not UNSET:
        turns = _chat(record.conversations)
    else:
        prompt = record.instruction or record.prompt or record.question
        answer = record.output or record.completion or record.answer or record.response
        if record.text and not prompt and not answer:
            return [_TEXT, record.text]
        if not prompt or not answer:
            raise ValueError
        turns = [_USER, _with_input(prompt, record) if record.input or record.context else prompt, _ASSISTANT, answer]
    if record.system and (system := bytes(record.system)) not in _ABSENT:
        if system[0] != _QUOTE:
            raise ValueError
        if turns[0] != _SYSTEM:
            turns[:0] = [_SYSTEM, system]
    return turns


def _chat(messages: Sequence[_Turn] | Sequence[_SharedTurn]) -> list[bytes | Raw]:
    roles = [_ROLES[turn.role] for turn in messages]
    if _USER not in roles or roles[-1] != _ASSISTANT:
        raise ValueError
    turns: list[bytes | Raw] = [b""] * (2 * len(roles))
    turns[::2], turns[1::2] = roles, [turn.content for turn in messages]
    return turns


def _with_input(prompt: bytes | Raw, record: _Record) -> bytes | Raw:
    for more in (record.input, record.context):
        if more and (literal := bytes(more)) not in _ABSENT:
            asked = bytes(prompt)
            if not (_begins_visibly(asked) and _begins_visibly(literal)):
                raise ValueError
            prompt = b"%b\\n\\n%b" % (asked[:-1], literal[1:])
    return prompt


def _begins_visibly(literal: bytes) -> bool:
    # (A backslash may stand for white space, and a quotation mark for the end.)
    return literal[0] == _QUOTE and literal[1] not in b'"\\' and bool(_VISIBLE[literal[1]])


def _resolved(parts: list[bytes | Raw]) -> tuple[bytearray, Flags]:
    """Roles and what literals stand for, each with NUL behind it, and which of the literals are in quotes.

    Literals of one character are taken out of `parts`.
    """
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    # A literal of one character, a digit, has no room for the quotes that are looked for below.
    for number in np.flatnonzero(sizes < 2).tolist():
        parts[number], sizes[number] = b'""', 2
    texts = bytearray().join(parts)
    characters = np.frombuffer(texts, np.uint8)
    ends = np.cumsum(sizes)
    opening, closing = ends[::2], ends[1::2] - 1
    quoted = characters[opening] == _QUOTE
    slashes = np.flatnonzero(characters == ord("\\"))
    # Of a run of backslashes every second one is escaped by the one before.
    runs = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
    within = np.arange(len(slashes)) - np.repeat(runs, np.diff(runs, append=len(slashes)))
    escapes = slashes[within % 2 == 0]
    characters[escapes + 1] = _ESCAPED[characters[escapes + 1]]
    characters[escapes] = NO_UTF8
    # Roles end where literals begin, so that quotes make room for all that is needed.
    characters[opening] = characters[closing] = 0
    return texts.replace(bytes([NO_UTF8]), b""), quoted


def _visible(beginnings: Bytes) -> Flags:
    """Which texts, of which these are the first three bytes each, are not blank, beyond doubt."""
    first, second, third = beginnings
    # From U+00A1 on, and dashes and quotation marks.
    signs = (first == 0xC2) & (second > 0xA0)
    signs |= (first == 0xE2) & (second == 0x80) & (third >= 0x90) & (third < 0xA8)
    visible: Flags = _VISIBLE[first] | signs
    return visible
