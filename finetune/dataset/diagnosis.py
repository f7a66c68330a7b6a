"""What exactly is wrong with a line that the fast parser refused, and at which byte.

The strict reading is that of RFC 8259 with what training cannot use ruled out: numbers beyond a
double, NaN and Infinity, lone surrogates, NUL, and nesting without bound. Of several faults in a line
the reason named is the first in this order: NUL byte, invalid UTF-8, nesting, JSON from left to right,
then escapes.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from finetune.dataset.rules import RejectedError

_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|NaN|-?Infinity|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?', re.DOTALL)
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise OverflowError(number)
    return value


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_int=_finite, parse_float=_finite)


def diagnose(line: bytes, *, terminated: bool, max_depth: int) -> Any:
    """Parse one line the strict way.

    Args:
        line: the line without its line break and byte order mark.
        terminated: whether a line break followed; only a file's last line may lack it, and one that
            is broken was then probably cut off while being written.
        max_depth: the deepest nesting of objects and arrays that is allowed.

    Returns:
        The parsed value; its numbers are all floats.

    Raises:
        RejectedError: the line is no JSON value that can be trained on.
    """
    if (position := line.find(b"\0")) >= 0:
        raise RejectedError("nul", position=position)
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise RejectedError("invalid_utf8" if terminated else "half_line", position=error.start) from error
    if text.count("{") + text.count("[") > max_depth:
        check_depth(line, max_depth)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        position = _byte_position(text, error.pos)
        if not terminated:
            raise RejectedError("half_line", position=position) from error
        several = error.msg == "Extra data" and _is_object_after_object(text, error.pos)
        raise RejectedError("several_objects" if several else "bad_json", position=position) from error
    except OverflowError as error:
        raise RejectedError("non_finite_number", position=_first_non_finite(text)) from error
    _check_escapes(text)
    return value


def _byte_position(text: str, position: int) -> int:
    return len(text[:position].encode())


def check_depth(line: bytes, max_depth: int) -> None:
    """Follow the brackets of a line, those of values that a later one of the same name replaces included.

    Raises:
        RejectedError: objects and arrays nest deeper than `max_depth`.
    """
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(line):
        if token[0] in b"[{":
            depth += 1
            if depth > max_depth:
                raise RejectedError("too_deep", position=token.start())
        elif token[0] in b"]}":
            depth -= 1


def _first_non_finite(text: str) -> int | None:
    for token in _TOKEN.finditer(text):
        if token[0][0] in "NI-0123456789" and not math.isfinite(float(token[0])):
            return _byte_position(text, token.start())
    return None


def _is_object_after_object(text: str, position: int) -> bool:
    rest = text[position:].lstrip(" \t\r\n,")
    if not (text.lstrip().startswith("{") and rest.startswith("{")):
        return False
    try:
        json.JSONDecoder().raw_decode(rest)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _check_escapes(text: str) -> None:
    high: int | None = None
    after_high = -1
    for escape in _ESCAPE.finditer(text):
        code = int(escape[1], 16) if escape[1] else 0x20
        pairs = high is not None and escape.start() == after_high and 0xDC00 <= code <= 0xDFFF
        if high is not None and not pairs:
            raise RejectedError("lone_surrogate", position=_byte_position(text, high))
        high = None
        if pairs:
            continue
        if code == 0:
            raise RejectedError("nul", position=_byte_position(text, escape.start()))
        if 0xDC00 <= code <= 0xDFFF:
            raise RejectedError("lone_surrogate", position=_byte_position(text, escape.start()))
        if 0xD800 <= code <= 0xDBFF:
            high, after_high = escape.start(), escape.end()
    if high is not None:
        raise RejectedError("lone_surrogate", position=_byte_position(text, high))
