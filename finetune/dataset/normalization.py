"""What counts when texts are compared: Unicode NFC, and white space only where it parts something.

Runs of ASCII white space (space, tab, line feed, carriage return, vertical tab, form feed) are one space, and there
is none at a text's ends.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from finetune.dataset.rules import CHAT_ROLES, Turn
from finetune.dataset.unusual import Bytes, Places

_ROLES = {role: role.encode() for role in (*CHAT_ROLES, "text")}
_PROMPT_ROLES = ("user", "text")
_SPACE = ord(" ")
# A byte that no text holds.
NO_UTF8 = 0xFF


def normalized(text: str) -> bytes:
    """The text in NFC as UTF-8, with white space folded."""
    return b" ".join(_composed(text).split())


def content_key(turns: list[Turn]) -> tuple[bytes, bytes]:
    """A record's normalised content and prompt, to be hashed.

    The content is role and text of all turns, whatever the record's format; NUL, which no record may
    hold, stands between them. The prompt is the first user turn, or all of a plain text.
    """
    folded = [(_ROLES[role], normalized(text)) for role, text in turns]
    return b"\0".join([part for turn in folded for part in turn]), folded[_asked(turns)][1]


class Hashes(NamedTuple):
    """XXH3 of the contents, of shape (records, 2), and of the prompts of records."""

    contents: npt.NDArray[np.uint64]
    prompts: npt.NDArray[np.uint64]


class Contents:
    """Gathers records to hash their content keys: white space is folded in all of them at once."""

    def __init__(self) -> None:
        # Roles and texts of all records; of each record the number of its first one, and that of its prompt.
        self._parts: list[bytes] = []
        self._first: list[int] = []
        self._asked: list[int] = []

    def add(self, turns: list[Turn]) -> None:
        """Take a record."""
        self._first.append(len(self._parts))
        self._asked.append(len(self._parts) + 2 * _asked(turns) + 1)
        for role, text in turns:
            self._parts += (_ROLES[role], _composed(text))

    def hashes(self) -> Hashes:
        """Of each record's `content_key`, in the order in which they were added.

        Raises:
            ValueError: a text holds NUL.
        """
        texts = bytearray(b"\0").join([*self._parts, b""])
        return Texts(texts, len(self._parts)).hashes(self._first, self._asked)


class Texts:
    """Roles and texts of many records, with white space folded.

    Args:
        texts: each in NFC, with NUL behind it; they are changed.
        parts: how many there are.

    Raises:
        ValueError: a text holds NUL.
    """

    def __init__(self, texts: bytearray, parts: int) -> None:
        self._folded, self._ends = _folded(texts) if parts else (texts, np.empty(0, np.int64))
        if len(self._ends) != parts:
            raise ValueError("a text holds NUL")
        self._starts = np.append(0, self._ends + 1)

    def beginnings(self, parts: slice, size: int) -> Bytes:
        """The first bytes of some, and whatever follows where these are shorter: of shape (size, parts)."""
        places = np.minimum(self._starts[:-1][parts] + np.arange(size)[:, None], len(self._folded) - 1)
        return np.frombuffer(self._folded, np.uint8)[places]

    def hashes(self, first: npt.ArrayLike, asked: npt.ArrayLike) -> Hashes:
        """The hashes of records' content keys, by the numbers of their first roles and of their prompts."""
        view, first, asked = memoryview(self._folded), np.asarray(first, np.int64), np.asarray(asked, np.int64)
        bounds = [*self._starts[first].tolist(), int(self._starts[-1])]
        contents = b"".join([xxh3_128_digest(view[start : end - 1]) for start, end in pairwise(bounds)])
        prompts = zip(self._starts[asked].tolist(), self._ends[asked].tolist(), strict=True)
        return Hashes(
            np.frombuffer(contents, "<u8").reshape(-1, 2),
            np.array([xxh3_64_intdigest(view[start:end]) for start, end in prompts], np.uint64),
        )


def _asked(turns: list[Turn]) -> int:
    for number, (role, _) in enumerate(turns):
        if role in _PROMPT_ROLES:
            return number
    raise ValueError("a record without a prompt")


def _composed(text: str) -> bytes:
    return (text if text.isascii() else normalize("NFC", text)).encode()


def _folded(texts: bytearray) -> tuple[bytearray, Places]:
    """Texts that all end with NUL, with their white space folded, and where they end now."""
    characters = np.frombuffer(texts, np.uint8)
    # What may have to change: what is neither printed nor a space, and spaces before such or before a space.
    low = characters <= _SPACE
    unusual = characters < _SPACE
    unusual[:-1] |= low[:-1] & low[1:]
    places = np.flatnonzero(unusual)
    found = characters[places]
    ends = places[found == 0]
    # The five other kinds of white space follow one another.
    white = places[(found == _SPACE) | ((found - np.uint8(ord("\t"))) < 5)]
    characters[white] = _SPACE
    # Of each run the last one stays, but not at the end of a text. (But for one bit, NUL and space are the same.)
    texts, ends = _without(texts, white[(characters[white + 1] & ~np.uint8(_SPACE)) == 0], ends)
    characters = np.frombuffer(texts, np.uint8)
    leading = np.append(0, ends[:-1] + 1)
    return _without(texts, leading[characters[leading] == _SPACE], ends)


def _without(texts: bytearray, places: Places, ends: Places) -> tuple[bytearray, Places]:
    if not len(places):
        return texts, ends
    np.frombuffer(texts, np.uint8)[places] = NO_UTF8
    return texts.replace(bytes([NO_UTF8]), b""), ends - np.searchsorted(places, ends)
