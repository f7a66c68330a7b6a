r"""Lines in outline: their long texts are taken out, then checked and normalised in all lines at once.

Nine tenths of most exports are long texts. To parse them into Python's strings, one after the other, and these into
what is hashed takes most of the time that preparation could take; numpy does it for a whole range in a third. What is
left of a line is its outline: JSON with a mark for each long text.

A text is taken out only if it can be nothing but the content of a valid JSON string that holds no ``\u`` escape, so
that a line is a record if and only if its outline is one. All other lines are left whole, for slower ways.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

from finetune.dataset.normalization import normalized

# Shorter texts cost less where they are.
_LONG_BYTES = 64
# Begins a text's mark. No other text of a line in outline holds it: JSON allows it as a \u escape alone.
_MARK = "\x01"
_MARKS_STEP = 4096
# Where more than one of so many bytes is a quote, an escape, or the start of a character of three bytes or four (short
# turns, \\u escapes, Chinese), lines are read faster one by one.
_BYTES_PER_SPECIAL = 10

Positions = npt.NDArray[np.int64]
Characters = npt.NDArray[np.uint8]
_Mask = npt.NDArray[np.bool_]


class Texts(dict[str, bytes]):
    """What texts normalise to: those that were taken out by their marks, all others by themselves."""

    def __missing__(self, text: str) -> bytes:
        if _MARK in text:
            # Instruction and input, with an empty line between them.
            return b" ".join(filter(None, map(self.__getitem__, text.split("\n\n"))))
        self[text] = normal = normalized(text)
        return normal


def worth_outlining(characters: Characters) -> bool:
    """Whether lines are of the kind that is read faster in outline."""
    quotes, slashes = (np.count_nonzero(characters == ord(character)) for character in '"\\')
    return bool(_BYTES_PER_SPECIAL * (quotes + slashes + np.count_nonzero(characters >= 0xE0)) < len(characters))


def outlined(data: bytes, long_bytes: int = _LONG_BYTES) -> tuple[list[bytes], Texts]:
    """Lines in outline, an empty one for each that must be read whole, and the texts that were taken out.

    Args:
        data: lines, each with a line feed.
        long_bytes: texts up to this length stay.
    """
    characters = np.frombuffer(data, np.uint8)
    found = _special(characters)
    whole = _any_within(found.escapes[~(found.folding | found.literal)], found.starts, found.ends)
    opening, closing = _strings(found, whole)
    long = closing - opening > long_bytes
    opening, closing = opening[long], closing[long]
    folded, dropped = _folded(characters, found.escapes[found.folding], found.escapes[found.literal])
    first = opening - np.searchsorted(dropped, opening)
    last = closing - np.searchsorted(dropped, closing)
    first += folded[first] == ord(" ")
    last -= folded[last - 1] == ord(" ")
    unfit = _any_within(found.controls, opening, closing) | _perhaps_blank(folded, first, last)
    changing = np.zeros(0, np.int64)
    if not data.isascii():
        invalid, changing = _beyond_ascii(characters)
        # A character that is cut off is found by the quote that stands in it.
        unfit |= _any_within(invalid, opening, closing + 1)
    lines = np.searchsorted(found.ends, opening)
    whole[lines[unfit]] = True
    fit = ~whole[lines]
    opening, closing, first, last = opening[fit], closing[fit], first[fit], last[fit]
    buffer = folded.tobytes()
    texts = [buffer[start:end] for start, end in zip(first.tolist(), last.tolist(), strict=True)]
    for number in np.flatnonzero(_any_within(changing, opening, closing)).tolist():
        texts[number] = normalize("NFC", texts[number].decode()).encode()
    marks, written = _marks(-(-len(texts) // _MARKS_STEP) * _MARKS_STEP)
    outlines = _without(data, opening.tolist(), closing.tolist(), written).split(b"\n")[:-1]
    whole |= ~_any_within(opening, found.starts, found.ends)
    for number in np.flatnonzero(whole).tolist():
        outlines[number] = b""
    return outlines, Texts(zip(marks, texts, strict=False))


def _without(data: bytes, starts: list[int], ends: list[int], marks: list[bytes]) -> bytes:
    """`data` with marks in place of stretches."""
    if not starts:
        return data
    between = [data[start:end] for start, end in zip([0, *ends], starts, strict=False)]
    return b"".join([*chain.from_iterable(zip(between, marks, strict=False)), data[ends[-1] :]])


@lru_cache(maxsize=4)
def _marks(count: int) -> tuple[list[str], list[bytes]]:
    """Marks of texts, and how JSON writes them."""
    return [f"{_MARK}{number}" for number in range(count)], [b"\\u0001%d" % number for number in range(count)]


def _any_within(positions: Positions, starts: Positions, ends: Positions) -> _Mask:
    """Which stretches hold any of the positions, which are sorted."""
    within: _Mask = np.searchsorted(positions, starts) != np.searchsorted(positions, ends)
    return within


class _Special(NamedTuple):
    """Where lines start, their line feeds are, and control characters, quotes that part strings, and escapes.

    Of the escapes, `folding` stand for white space, `literal` for their second character.
    """

    starts: Positions
    ends: Positions
    controls: Positions
    quotes: Positions
    escapes: Positions
    folding: _Mask
    literal: _Mask


def _special(characters: Characters) -> _Special:
    # (To look for all of them at once takes a third of the time.)
    places = np.flatnonzero((characters < ord(" ")) | (characters == ord('"')) | (characters == ord("\\")))
    kinds = characters[places]
    controls, quotes = places[kinds < ord(" ")], places[kinds == ord('"')]
    escapes = _escapes(places[kinds == ord("\\")])
    escaped = characters[escapes + 1]
    parting = np.ones(len(quotes), np.bool_)
    parting[np.searchsorted(quotes, escapes[escaped == ord('"')] + 1)] = False
    ends = places[kinds == ord("\n")]
    return _Special(
        starts=np.concatenate(([0], ends[:-1] + 1)),
        ends=ends,
        controls=controls,
        quotes=quotes[parting],
        escapes=escapes,
        folding=np.isin(escaped, np.frombuffer(b"ntrf", np.uint8)),
        literal=np.isin(escaped, np.frombuffer(b'"\\/', np.uint8)),
    )


def _escapes(slashes: Positions) -> Positions:
    """Backslashes that begin an escape: every other one of several in a row."""
    runs = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
    before = np.arange(len(slashes)) - np.repeat(runs, np.diff(runs, append=len(slashes)))
    first: Positions = slashes[before % 2 == 0]
    return first


def _strings(found: _Special, whole: _Mask) -> tuple[Positions, Positions]:
    """Where strings start and end, without their quotes; lines with a quote too many become `whole`."""
    counts = np.diff(np.searchsorted(found.quotes, found.ends), prepend=0)
    odd = counts % 2 == 1
    whole |= odd
    quotes = found.quotes[np.repeat(~odd, counts)] if odd.any() else found.quotes
    return quotes[::2] + 1, quotes[1::2]


def _beyond_ascii(characters: Characters) -> tuple[Positions, Positions]:
    """What is no UTF-8 (RFC 3629), and characters that NFC may change.

    Of a character that is cut off, the byte after it is told. All characters may change, or their neighbours by them,
    but U+0080 to U+02FF (Latin), U+0400 to U+0482 and U+048A to U+04FF (Cyrillic), U+2010 to U+203F (punctuation) and
    U+1F000 to U+1FFFF (emoji).
    """
    size = len(characters)
    expected = np.zeros(size + 3, np.bool_)
    leads = np.greater_equal(characters, 0xC0, out=expected[1 : size + 1])
    # All but 0xC2 to 0xCB, which lead to U+02FF, and 0xD0 and 0xD1, which lead from U+0400 to U+047F.
    rare = np.flatnonzero(leads & (characters - np.uint8(0xC2) > 0x09) & ((characters & 0xFE) != 0xD0))
    first, second, third = (characters[np.minimum(rare + after, size - 1)] for after in range(3))
    expected[rare[first >= 0xE0] + 2] = True
    expected[rare[first >= 0xF0] + 3] = True
    # As signed numbers, the bytes that continue a character are the lowest.
    wrong = expected[:size] != (characters.view(np.int8) < -64)
    overlong = (first < 0xC2) | ((first == 0xE0) & (second < 0xA0)) | ((first == 0xF0) & (second < 0x90))
    surrogate = (first == 0xED) & (second >= 0xA0)
    beyond = (first > 0xF4) | ((first == 0xF4) & (second >= 0x90))
    wrong[rare[overlong | surrogate | beyond]] = True
    cyrillic = (first == 0xD3) | ((first == 0xD2) & ((second <= 0x82) | (second >= 0x8A)))
    punctuation = (first == 0xE2) & (second == 0x80) & (third >= 0x90)
    emoji = (first == 0xF0) & (second == 0x9F)
    return np.flatnonzero(wrong), rare[~(cyrillic | punctuation | emoji)]


def _folded(characters: Characters, folding: Positions, literal: Positions) -> tuple[Characters, Positions]:
    """Characters without escapes and with white space folded, and which of them were dropped for that."""
    spaces = characters == ord(" ")
    spaces[folding] = spaces[folding + 1] = True
    drop = np.zeros(len(characters), np.bool_)
    np.logical_and(spaces[1:], spaces[:-1], out=drop[1:])
    drop[literal] = True
    changed = characters.copy()
    changed[folding] = ord(" ")
    return changed[~drop], np.flatnonzero(drop)


def _perhaps_blank(folded: Characters, first: Positions, last: Positions) -> _Mask:
    """Which stretches may hold nothing but white space, Unicode's included: they begin like it."""
    begin = folded[first]
    perhaps: _Mask = (first >= last) | (begin == 0xC2) | ((begin >= 0xE1) & (begin <= 0xE3))
    return perhaps
