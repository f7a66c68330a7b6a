"""Which lines are taken for usual: only those whose bytes are their texts in NFC, whatever stands beside what."""

from __future__ import annotations

import itertools
import sys
import unicodedata

import numpy as np
import pytest

from finetune.dataset.unusual import look_at_lines

CHARACTERS = [chr(code) for code in range(1, sys.maxunicode + 1) if not 0xD800 <= code < 0xE000 and chr(code) != "\n"]
# What may be joined with the character before it.
SECOND_PARTS = {
    chr(int(parts[1], 16))
    for parts in (unicodedata.decomposition(character).split() for character in CHARACTERS)
    if len(parts) == 2 and not parts[0].startswith("<")
}


def usual(lines: list[bytes], *, max_line_bytes: int = 4000, max_depth: int = 8) -> list[bool]:
    data = b"".join(line + b"\n" for line in lines)
    ends = np.cumsum([len(line) + 1 for line in lines])
    found = look_at_lines(np.frombuffer(data, np.uint8), ends, max_line_bytes=max_line_bytes, max_depth=max_depth)
    return [not each for each in found.unusual.tolist()]


def usual_at_ends(endings: list[bytes]) -> list[bool]:
    """The same for lines of ASCII that end so: where most of a range needs a closer look, it gets none."""
    plain = b"a" * 124
    return [
        each
        for start in range(0, len(endings), 10_000)
        for each in usual([plain + ending for ending in endings[start : start + 10_000]])
    ]


def test_every_usual_character_is_in_nfc_beside_any_other() -> None:
    found = list(itertools.compress(CHARACTERS, usual_at_ends([character.encode() for character in CHARACTERS])))

    assert all(unicodedata.is_normalized("NFC", character) for character in found)
    assert not any(map(unicodedata.combining, found))
    assert not SECOND_PARTS & set(found)
    assert len(SECOND_PARTS) > 50
    # Hangul's parts are joined by a rule, not by a table.
    assert not any("\u1100" <= character < "\u1200" for character in found)
    assert set("aZ9~ éßŁőґҐїЩщёқαΩ—“”…•€№™→∑✓中文🎉🚀\ufe0f") <= set(found)
    assert not set("\u0301\u0387\u0483\u2000\u2126\u212b\u2329かक한") & set(found)


def test_no_bytes_that_are_not_utf_8_are_usual() -> None:
    beside = [0x22, 0x7F, 0x80, 0x81, 0x82, 0x8A, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xD0, 0xE2, 0xE4, 0xF0, 0xFF]
    lines = [bytes(each) for each in itertools.product(range(0x80, 0x100), beside, beside, beside)]
    taken = list(itertools.compress(lines, usual_at_ends(lines)))

    assert len(taken) > 1000
    for line in taken:
        assert unicodedata.is_normalized("NFC", line.decode())
    # And at the ends of lines, where nothing may be taken from the next.
    cut = [b"", *(bytes([lead]) for lead in range(0x80, 0x100)), b"\xe4\xb8", b"\xf0\x9f", b"\xf0\x9f\x8e"]
    assert list(itertools.compress(cut, usual_at_ends(cut))) == [b""]
    assert not any(usual([b"a" * 124 + line])[0] for line in cut[1:])
    # Nor may the next line be what was broken off.
    for lead, rest in ((b"\xd0", b"\x80"), (b"\xe4", b"\x80"), (b"\xf0", b"\x80\x80"), (b"\xf0\n", b"\x80")):
        lines = (b"a" * 200 + lead + b"\n" + rest + b"a" * 200).split(b"\n")
        assert usual(lines)[:: len(lines) - 1] == [False, False]


@pytest.mark.parametrize(
    "line",
    [
        b'{"text":"a","n":1e309}',
        b'{"text":"a","n":-1.5E+0400}',
        b'{"text":"a","n":[0.1e-400]}',
        b'{"n":' + b"9" * 400 + b',"text":"a"}',
        b'{"n":' + b"9" * 260 + b'e99,"text":"a"}',
        b'{"text":"\\u0061"}',
        b'{"text":"a","x":"\\u0000"}',
        b'{"text":"a","x":[[[[[[[[0]]]]]]]]}',
        b'{"text":"' + b"a" * 4000 + b'"}',
    ],
)
def test_what_a_parser_may_take_for_good_wrongly_is_unusual(line: bytes) -> None:
    good = b'{"text":"b","n":1.5e10,"m":12345678901234567890,"u":"3e40-55 \\\\n \\/"}'
    # (The brackets of 64 bytes count for both lines that share them.)
    apart = [each + b" " * (-(len(each) + 1) % 64) for each in (good, line, good)]

    assert usual(apart) == [True, False, True]
    # As alone, and wherever a line may begin within a word.
    assert [usual([b" " * shift, line])[1] for shift in range(130)] == [False] * 130


@pytest.mark.parametrize("other", ["\\u0456", "語", "ع", "λ"])
def test_where_most_lines_are_unusual_none_gets_a_closer_look(other: str) -> None:
    few, many = [b"a" * 200] * 9 + [other.encode()], [b"a" * 20] * 9 + [other.encode() * 40]

    assert usual(few)[:9] == [True] * 9
    assert usual(many) == [False] * 10


def test_a_line_is_as_long_and_as_deep_as_is_allowed() -> None:
    assert usual([b"a" * 100, b"a" * 101], max_line_bytes=100) == [True, False]
    assert usual([b"[" * 3 + b" " * 60, b"{" * 4 + b" " * 59, b"{[" + b" " * 61], max_depth=3) == [True, False, True]
