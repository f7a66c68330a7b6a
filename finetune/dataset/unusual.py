"""Which lines of a range have to be looked at one by one: found in all of them at once, by passes over their bytes.

Usual is a line whose characters are valid UTF-8 that is in NFC whatever their order, without escapes that are
numbers, without numbers that may be too large for a double, neither over-long nor deeply nested. Those
characters are the ones up to U+02FF, from U+0380 to U+057F but for some, from U+4000 to U+9FFF, from U+1F000 to
U+1FFFF, and common symbols (see `_AFTER_E2`). Where most are neither Latin nor Cyrillic, no line is told usual.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# The lengths of usual characters but for Latin and most Cyrillic ones, by their first byte.
_LENGTHS = np.zeros(256, np.uint8)
_LENGTHS[[0xCE, 0xCF, *range(0xD2, 0xD6)]] = 2
_LENGTHS[[0xE2, *range(0xE4, 0xEA), 0xEF]] = 3
_LENGTHS[0xF0] = 4
# What may follow E2: U+2002 to U+203F, U+2080 to U+20BF, U+2100 to U+213F (but for three), U+2180 to U+22FF and U+2340
# to U+27FF.
_AFTER_E2 = np.zeros(256, np.bool_)
_AFTER_E2[[0x80, 0x82, 0x84, *range(0x86, 0x8C), *range(0x8D, 0xA0)]] = True
ESCAPED_NUL = b"\\u0000"
# Where more bytes than one of so many need a closer look, or are escaped, no line gets one: that would be slower.
_RARE, _ESCAPES = 16, 32
_WORD = 64


class Looks(NamedTuple):
    """What is told of each line: that a parser may take it for good wrongly, or that it is not usual, which is more."""

    suspect: Flags
    unusual: Flags


def look_at_lines(characters: Bytes, ends: Places, *, max_line_bytes: int, max_depth: int) -> Looks:
    """Tell usual lines from others, of which some may be usual too.

    Args:
        characters: the lines, each with its line feed.
        ends: where each line ends, behind its line feed.
        max_line_bytes: how long a line that is not suspect may be, without its line feed.
        max_depth: how many objects and arrays may begin in a line that is not suspect.
    """
    sizes = np.diff(ends, prepend=0)
    lowered = characters | np.uint8(0x20)
    suspect = (sizes - 1 > max_line_bytes) | (_opened(lowered, ends - sizes, ends) > max_depth)
    # (Here a character that the line before cuts off would seem to go on.)
    suspect |= characters[ends - sizes] & 0xC0 == 0x80
    others, escapes = _characters(characters), _numeric_escapes(characters)
    nuls = _escaped_nuls(characters, escapes)
    suspect[np.searchsorted(ends, nuls, side="right")] = True
    if others is None or escapes is None:
        return Looks(suspect, np.ones(len(ends), np.bool_))
    unusual = suspect.copy()
    places = np.concatenate([others, escapes, _numbers(characters, lowered)])
    unusual[np.searchsorted(ends, places, side="right")] = True
    return Looks(suspect, unusual)


def _opened(lowered: Bytes, starts: Places, ends: Places) -> Places:
    """How many brackets and braces open in each line, those counted too that share a word with its first or last."""
    # (Brackets and braces differ in one bit.)
    opening = np.zeros(-(-len(lowered) // _WORD) * _WORD, np.bool_)
    np.equal(lowered, ord("{"), out=opening[: len(lowered)])
    counts = np.bitwise_count(np.packbits(opening).view(np.uint64))
    before: Places = np.append(0, np.cumsum(counts, dtype=np.int64))
    opened: Places = before[-(-ends // _WORD)] - before[starts // _WORD]
    return opened


def _escaped_nuls(characters: Bytes, escapes: Places | None) -> Places:
    if escapes is None:
        # Few other escapes have a zero in this place.
        escapes = np.flatnonzero((characters[:-5] == ESCAPED_NUL[0]) & (characters[4:-1] == ESCAPED_NUL[4]))
    for place, character in enumerate(ESCAPED_NUL):
        # (What lies beyond the last character, a line feed, is none of these either.)
        escapes = escapes[characters[np.minimum(escapes + place, len(characters) - 1)] == character]
    return escapes


def _characters(characters: Bytes) -> Places | None:
    """Where characters are that are not usual, or not characters; None if too many are none of the most common ones."""
    two = (characters - np.uint8(0xC2) < 10) | (characters & 0xFE == 0xD0)
    others = (characters >= 0xC0) > two
    if np.count_nonzero(others) > len(characters) // _RARE:
        return None
    rare = np.flatnonzero(others)
    # Where a character goes on and must not, or must and does not. (As signed numbers, 80 to BF are the least.)
    wrong = np.zeros(len(characters) + 3, np.bool_)
    np.not_equal(characters[1:].view(np.int8) < -64, two[:-1], out=wrong[1 : len(characters)])
    leads, second = characters[rare], characters[rare + 1]
    third = characters[np.minimum(rare + 2, len(characters) - 1)]
    lengths = _LENGTHS[leads]
    for length in (2, 3, 4):
        wrong[rare[lengths >= length] + length - 1] ^= True
    odd = lengths == 0
    odd |= (leads == 0xCE) & (second == 0x87)
    odd |= (leads == 0xD2) & (second < 0x8A)
    odd |= (leads == 0xE2) & ~(_AFTER_E2[second] & ((second != 0x80) | (third >= 0x82)))
    # The signs of ohm, kelvin and angstrom are other letters.
    odd |= (leads == 0xE2) & (second == 0x84) & (third >= 0xA6) & (third <= 0xAB)
    # Variation selectors alone.
    odd |= (leads == 0xEF) & ~((second == 0xB8) & (third < 0x90))
    odd |= (leads == 0xF0) & (second != 0x9F)
    return np.concatenate([rare[odd], np.flatnonzero(wrong[: len(characters)])])


def _numeric_escapes(characters: Bytes) -> Places | None:
    """Where escapes by number are; None if there are too many escapes of any kind."""
    slashes = characters == ord("\\")
    if np.count_nonzero(slashes) > len(characters) // _ESCAPES:
        return None
    return np.flatnonzero(slashes[:-1] & (characters[1:] == ord("u")))


def _numbers(characters: Bytes, lowered: Bytes) -> Places:
    """Where exponents of three digits are, and numbers of at least 192, or of fewer."""
    digits = characters - np.uint8(ord("0")) < 10
    after = np.flatnonzero(digits[:-1] & (lowered[1:] == ord("e"))) + 2
    # (What lies beyond the last character, a line feed, is no digit either.)
    last = len(characters) - 1
    sign = characters[np.minimum(after, last)]
    exponents = after + ((sign == ord("+")) | (sign == ord("-")))
    for place in range(3):
        exponents = exponents[digits[np.minimum(exponents + place, last)]]
    # A double holds any number of less than 309 digits before its point, those that an exponent of two adds included.
    some = digits[::_WORD]
    return np.concatenate([exponents, np.flatnonzero(some[2:] & some[1:-1] & some[:-2]) * _WORD])
