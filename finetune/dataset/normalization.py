"""What counts when texts are compared: Unicode NFC, and white space only where it parts something.

Runs of ASCII white space (space, tab, line feed, carriage return, vertical tab, form feed) are one space, and there
is none at a text's ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from unicodedata import normalize

import numpy as np

from finetune.dataset.rules import CHAT_ROLES, Turn

_ROLES = {role: role.encode() for role in (*CHAT_ROLES, "text")}
_PROMPT_ROLES = (b"user", b"text")
_SPACE = ord(" ")
_NO_UTF8 = 0xFF


def normalized(text: str) -> bytes:
    """The text in NFC as UTF-8, with white space folded."""
    return b" ".join(_composed(text).split())


def content_key(turns: list[Turn]) -> tuple[bytes, bytes]:
    """A record's normalised content and prompt, to be hashed.

    The content is role and text of all turns, whatever the record's format; NUL, which no record may
    hold, stands between them. The prompt is the first user turn, or all of a plain text.
    """
    folded = [(role.encode(), normalized(text)) for role, text in turns]
    prompt = next(text for role, text in folded if role in _PROMPT_ROLES)
    return b"\0".join([part for turn in folded for part in turn]), prompt


class Contents:
    """The content keys of many records: white space is folded in all of them at once.

    This takes a fifth of the time of splitting one text after the other at its spaces.
    """

    def __init__(self) -> None:
        # Roles and texts of all records, and how many of them there were after each record.
        self._parts: list[bytes] = []
        self._counts: list[int] = []

    def add(self, turns: list[Turn]) -> None:
        """Take a record."""
        for role, text in turns:
            self._parts += (_ROLES[role], _composed(text))
        self._counts.append(len(self._parts))

    def keys(self) -> Iterator[tuple[bytes, bytes]]:
        """The `content_key` of each record, in the order in which they were added.

        Raises:
            ValueError: a text holds NUL.
        """
        folded, ends = _folded(bytearray(b"\0").join([*self._parts, b""]))
        if len(ends) != len(self._parts):
            raise ValueError("a text holds NUL")
        start = first = 0
        for count in self._counts:
            asked = first
            while self._parts[asked] not in _PROMPT_ROLES:
                asked += 2
            end = ends[count - 1]
            yield folded[start:end], folded[ends[asked] + 1 : ends[asked + 1]]
            start, first = end + 1, count


def _composed(text: str) -> bytes:
    return (text if text.isascii() else normalize("NFC", text)).encode()


def _folded(texts: bytearray) -> tuple[bytes, list[int]]:
    """Texts that all end with NUL, with their white space folded, and where they end now."""
    characters = np.frombuffer(texts, np.uint8)
    # The five other kinds of white space follow one another.
    characters[np.flatnonzero((characters - np.uint8(ord("\t"))) < 5)] = _SPACE
    # Of each run the last one stays, but not at the end of a text. (But for one bit, NUL and space are the same.)
    dropped = characters == _SPACE
    dropped[:-1] &= (characters[1:] & ~np.uint8(_SPACE)) == 0
    characters = characters[~dropped]
    ends = np.flatnonzero(characters == 0)
    leading = ends[:-1] + 1
    leading = leading[characters[leading] == _SPACE]
    characters[leading] = _NO_UTF8
    ends -= np.searchsorted(leading, ends)
    return characters.tobytes().replace(bytes([_NO_UTF8]), b""), ends.tolist()
