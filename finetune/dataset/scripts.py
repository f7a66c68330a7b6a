"""Which writing systems a text uses, letter by letter."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

SCRIPTS = ("cyrillic", "latin", "other")


def count_letters(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """How many letters of each of `SCRIPTS` the texts hold; digits, marks and spaces are no letters."""
    points = np.frombuffer("".join(texts).encode("utf-32-le", errors="surrogatepass"), np.uint32)
    return np.bincount(_classes()[points], minlength=len(SCRIPTS) + 1)[: len(SCRIPTS)]


@lru_cache(maxsize=1)
def _classes() -> npt.NDArray[np.uint8]:
    """The class of every code point: an index into `SCRIPTS`, or one beyond for what is no letter."""
    classes = np.full(sys.maxunicode + 1, len(SCRIPTS), np.uint8)
    for point in range(sys.maxunicode + 1):
        character = chr(point)
        if character.isalpha():
            name = unicodedata.name(character, "")
            script = name.partition(" ")[0].lower()
            classes[point] = SCRIPTS.index(script) if script in SCRIPTS else SCRIPTS.index("other")
    return classes
