"""Every way in which a line can be wrong, with its reason, field and byte; and what is right though it looks odd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from xxhash import xxh3_64_intdigest

from finetune.dataset.scan import RECORD, Limits, RangeTask, scan_range

GOOD = b'{"instruction":"a","output":"b"}'
LIMITS = Limits(max_line_bytes=400, max_depth=5)


def scan(directory: Path, content: bytes, limits: Limits = LIMITS) -> tuple[list[bytes], list[dict[str, Any]], int]:
    """Kept bytes, rejects with their line numbers from 1, and blank lines of a file with this content."""
    path = directory / "export.jsonl"
    path.write_bytes(content)
    found = scan_range(RangeTask(path, len(content), 0, len(content), xxh3_64_intdigest(content), limits))
    records = np.frombuffer(found.records, RECORD)
    rows = list(zip(records["offset"].tolist(), records["length"].tolist(), strict=True))
    rejects = [
        {"line": line + 1, **orjson.loads(reject)}
        for line, reject in zip(found.reject_lines, found.rejects, strict=True)
    ]
    assert found.lines == len(rows) + len(rejects) + found.blank
    return [content[offset : offset + length] for offset, length in rows], rejects, found.blank


def chat(*turns: object) -> bytes:
    return orjson.dumps({"messages": list(turns)})


USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("line", "reason", "field", "position"),
    [
        (b'{"instruction":"a",', "bad_json", None, 19),
        (b"not json", "bad_json", None, 0),
        (b'{"instruction":"a" "output":"b"}', "bad_json", None, 19),
        ('{"instruction":"привіт",,}'.encode(), "bad_json", None, 30),
        (b'{"instruction":"a\tb","output":"c"}', "bad_json", None, 17),
        (b'{"instruction":"a","output":"b",}', "bad_json", None, 32),
        (GOOD + b" trailing", "bad_json", None, 33),
        (GOOD + GOOD, "several_objects", None, 32),
        (GOOD + b", " + GOOD, "several_objects", None, 32),
        (b'{"instruction":"\xff","output":"b"}', "invalid_utf8", None, 16),
        (b'{"instruction":"\xd0","output":"b"}', "invalid_utf8", None, 16),
        (b'{"instruction":"\xed\xa0\x80","output":"b"}', "invalid_utf8", None, 16),
        (b'{"instruction":"a\0","output":"b"}', "nul", None, 17),
        (b'{"instruction":"a\\u0000","output":"b"}', "nul", None, 17),
        (b'{"instruction":"a","output":"b","meta":{"\\u0000":1}}', "nul", None, 41),
        (b'{"instruction":"\\ud800","output":"b"}', "lone_surrogate", None, 16),
        (b'{"instruction":"\\udc00\\ud800","output":"b"}', "lone_surrogate", None, 16),
        (b'{"instruction":"\\ud83d\\ude00 \\ud83d","output":"b"}', "lone_surrogate", None, 29),
        (b'{"instruction":"a","output":"b","score":NaN}', "non_finite_number", None, 40),
        (b'{"instruction":"NaN","output":"b","score":-Infinity}', "non_finite_number", None, 42),
        (b'{"instruction":"a","output":"b","score":[1,1e999]}', "non_finite_number", None, 43),
        (b'{"instruction":"a","output":"b","score":1e999e9}', "non_finite_number", None, 40),
        (b'{"x":[[[[[]]]]],"x":1,"text":"a"}', "too_deep", None, 9),
        (b'{"instruction":"a","output":"b","x":[[[[[1]]]]]}', "too_deep", None, 40),
        (b"[" * 300, "too_deep", None, 5),
        (b'{"instruction":"' + b"a" * 400 + b'","output":"b"}', "over_long", None, 400),
        (b"[1,2]", "not_an_object", None, None),
        (b'"text"', "not_an_object", None, None),
        (b"null", "not_an_object", None, None),
        (b"{}", "missing_field", "instruction", None),
        (b'{"instruction":"a"}', "missing_field", "output", None),
        (b'{"completion":"a"}', "missing_field", "instruction", None),
        (b'{"instruction":"a","text":"b"}', "missing_field", "output", None),
        (b'{"instruction":1,"output":"b"}', "wrong_type", "instruction", None),
        (b'{"prompt":"a","completion":null}', "wrong_type", "completion", None),
        (b'{"instruction":"a","input":["x"],"output":"b"}', "wrong_type", "input", None),
        (b'{"system":7,"instruction":"a","output":"b"}', "wrong_type", "system", None),
        (b'{"text":["a"]}', "wrong_type", "text", None),
        (b'{"instruction":"","output":"b"}', "empty_text", "instruction", None),
        ('{"question":"a","answer":" \u00a0\u2003"}'.encode(), "empty_text", "answer", None),
        (b'{"text":"\\n\\t"}', "empty_text", "text", None),
        (b'{"messages":{}}', "wrong_type", "messages", None),
        (b'{"messages":[]}', "no_user_turn", "messages", None),
        (chat(USER, "a"), "wrong_type", "messages[1]", None),
        (chat({"content": "q"}, ASSISTANT), "missing_field", "messages[0].role", None),
        (chat(USER, {"role": "assistant"}), "missing_field", "messages[1].content", None),
        (chat({"role": ["user"], "content": "q"}, ASSISTANT), "wrong_type", "messages[0].role", None),
        (chat(USER, {"role": "assistant", "content": None}), "wrong_type", "messages[1].content", None),
        (chat(USER, {"role": "assistant", "content": ["a"]}), "wrong_type", "messages[1].content", None),
        (chat(USER, {"role": "bot", "content": "a"}), "bad_role", "messages[1].role", None),
        (chat(USER, {"role": "assistant", "content": " "}), "empty_text", "messages[1].content", None),
        (chat(ASSISTANT), "no_user_turn", "messages", None),
        (chat(USER), "no_assistant_turn", "messages", None),
        (chat(USER, ASSISTANT, USER), "last_turn_not_assistant", "messages[2]", None),
        (b'{"conversations":[{"from":"alien","value":"q"}]}', "bad_role", "conversations[0].from", None),
        (b'{"conversations":[{"from":"human","value":""}]}', "empty_text", "conversations[0].value", None),
    ],
)
def test_a_bad_line_is_rejected_for_its_reason_at_its_place(
    tmp_path: Path, line: bytes, reason: str, field: str | None, position: int | None
) -> None:
    kept, rejects, _ = scan(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD + b"\n")

    assert kept == [GOOD, GOOD]
    [reject] = rejects
    assert (reject["reason"], reject["field"], reject["position"]) == (reason, field, position)
    assert (reject["line"], reject["offset"], reject["length"]) == (2, len(GOOD) + 1, len(line))
    assert reject["head"].startswith(line[:16].decode())


@pytest.mark.parametrize("cut", [1, 10, 20, 28, len(GOOD) - 1])
def test_a_last_line_cut_off_while_written_is_told_from_bad_json(tmp_path: Path, cut: int) -> None:
    kept, [reject], _ = scan(tmp_path, GOOD + b"\n" + GOOD[:cut])

    assert kept == [GOOD]
    assert reject["reason"] == "half_line"
    assert reject["line"] == 2


def test_a_last_line_cut_within_a_character_is_half_a_line(tmp_path: Path) -> None:
    _, [reject], _ = scan(tmp_path, '{"instruction":"п'.encode()[:-1])

    assert (reject["reason"], reject["position"]) == ("half_line", 16)


@pytest.mark.parametrize(
    "line",
    [
        GOOD,
        b'{"prompt":"a","completion":"b"}',
        b'{"question":"a","answer":"b"}',
        b'{"prompt":"a","response":"b"}',
        b'{"instruction":"a","input":"","output":"b"}',
        b'{"instruction":"a","input":null,"output":"b","system":""}',
        b'{"text":"a"}',
        b'{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a"}]}',
        chat({"role": "system", "content": "s"}, USER, {"role": "tool", "content": "t"}, ASSISTANT),
        b'  {"instruction" : "a" ,\t"output":"b"}  ',
        b'{"instruction":"\\u043f\\u0440\\u0438 \\ud83d\\ude00","output":"\\\\u0000"}',
        b'{"instruction":"a","output":"b","meta":{"x":[[[1]]]}}',
        b'{"instruction":"{[{[{[{[","output":"b"}',
        b'{"instruction":"a","output":"b","id":123456789012345678901234567890}',
        '{"instruction":"a\u2028b","output":"\x7f"}'.encode(),
    ],
)
def test_a_good_line_is_kept_byte_for_byte(tmp_path: Path, line: bytes) -> None:
    kept, rejects, _ = scan(tmp_path, line + b"\n")

    assert (kept, rejects) == ([line], [])


def test_line_breaks_of_any_kind_marks_and_blank_lines_are_no_part_of_a_record(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    content = mark + GOOD + b"\r\n\r\n" + GOOD + b"\r\n \t \n\n" + mark + b"\n" + mark + GOOD

    kept, rejects, blank = scan(tmp_path, content)

    assert (kept, rejects, blank) == ([GOOD, GOOD, GOOD], [], 4)


def test_positions_count_from_the_lines_first_byte_mark_included(tmp_path: Path) -> None:
    _, [reject], _ = scan(tmp_path, b"\xef\xbb\xbfnot json\n")

    assert (reject["offset"], reject["position"], reject["length"]) == (0, 3, 11)


def test_the_head_never_ends_within_a_character(tmp_path: Path) -> None:
    _, [reject], _ = scan(tmp_path, ("x" + "ї" * 150).encode() + b"\n")

    assert reject["head"] == "x" + "ї" * 59


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    assert scan(tmp_path, b"") == ([], [], 0)


def test_a_line_just_at_the_limit_is_kept_and_one_byte_more_is_not(tmp_path: Path) -> None:
    exact = GOOD + b" " * (LIMITS.max_line_bytes - len(GOOD))

    kept, rejects, _ = scan(tmp_path, exact + b"\n" + exact + b" \n")

    assert kept == [exact]
    assert [reject["reason"] for reject in rejects] == ["over_long"]


@pytest.mark.parametrize("line", [b"\xef\xbb\xbf" + GOOD, b'{"text":"\\\\u0000"}'])
@pytest.mark.parametrize("longer", [0, 1])
def test_the_limit_is_the_same_for_lines_that_are_looked_at_twice(tmp_path: Path, line: bytes, longer: int) -> None:
    limits = Limits(max_line_bytes=len(line) - longer, max_depth=5)

    kept, rejects, _ = scan(tmp_path, line + b"\n" + line, limits)

    assert len(kept) == (0 if longer else 2)
    assert [reject["reason"] for reject in rejects] == ["over_long"] * (2 * longer)
