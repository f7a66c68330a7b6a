"""Validation of one range of an export: which lines are records, where they lie, and what is wrong elsewhere.

A line belongs to the range in which it starts. Results are small and flat, since they travel between
processes: a record is a `RECORD`, a reject a line of JSON.
"""

from __future__ import annotations

import codecs
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from xxhash import xxh3_64_intdigest

from finetune.dataset.bulk import plain_records
from finetune.dataset.diagnosis import check_depth, diagnose
from finetune.dataset.normalization import Contents, content_key
from finetune.dataset.reading import changed, opened, read_exactly
from finetune.dataset.rules import RejectedError, Turn, checked_turns
from finetune.dataset.screening import Screened, Screener, Screening
from finetune.dataset.unusual import ESCAPED_NUL, Looks, Places, look_at_lines

# Changes whenever the same bytes could give another result: kept indexes are then made anew.
RULES_VERSION = 3
# The hashes of its normalised content and prompt, its offset and its length in bytes.
RECORD = np.dtype([("content", "<u8", (2,)), ("prompt", "<u8"), ("offset", "<u8"), ("length", "<u4")])
_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 120
_SCAN_AHEAD = 1 << 16
_Decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True)
class Limits:
    """The longest line in bytes, without its line feed, and the deepest nesting."""

    max_line_bytes: int
    max_depth: int


DEFAULT_LIMITS = Limits(max_line_bytes=1 << 20, max_depth=64)


@dataclass(frozen=True)
class RangeTask:
    """The lines of `path` that start in ``[start, end)``; `block` is the hash of just these bytes."""

    path: Path
    size: int
    start: int
    end: int
    block: int
    limits: Limits
    screening: Screening | None = None


@dataclass
class RangeScan:
    """What a range holds.

    `records` are packed `RECORD`s; `rejects` lines of JSON with offset, length, reason, field, position
    and head, whose line numbers within the range, from 0, are in `reject_lines`. `screened` is what the
    task's screening found, if it has one.
    """

    lines: int = 0
    blank: int = 0
    records: bytes = b""
    rejects: list[bytes] = field(default_factory=list)
    reject_lines: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    screened: Screened | None = None

    def reject(self, number: int, error: RejectedError, line: bytes, offset: int, length: int, shift: int = 0) -> None:
        """Count a line as rejected and say where and why; `shift` bytes precede what was parsed."""
        self.reasons[error.reason] += 1
        self.reject_lines.append(number)
        self.rejects.append(_reject(line, offset, length, error, shift))


@dataclass(frozen=True)
class _Lines:
    """The lines of a range, each with a line feed; the last one may be cut, and `cut` is its true length.

    `offsets` are their places in the file, and `lengths` are those without their line breaks.
    """

    lines: list[bytes] = field(default_factory=list)
    offsets: Places = field(default_factory=lambda: np.empty(0, np.int64))
    lengths: Places = field(default_factory=lambda: np.empty(0, np.int64))
    looks: Looks = field(default_factory=lambda: Looks(np.empty(0, np.bool_), np.empty(0, np.bool_)))
    terminated: bool = True
    cut: int | None = None


def scan_range(task: RangeTask) -> RangeScan:
    """Validate the lines that start in a range.

    Raises:
        DatasetError: the file cannot be read.
        TransientError: the file is not the one that was hashed.
    """
    found = _read_lines(task)
    scan = RangeScan(lines=len(found.lines))
    contents, numbers = Contents(), list[int]()
    starts, lengths = found.offsets.copy(), found.lengths
    screener = Screener(task.screening) if task.screening else None
    limits, last = task.limits, len(found.lines) - 1
    usual = [] if screener else np.flatnonzero(~found.looks.unusual).tolist()
    plain, hashes = plain_records(found.lines, usual)
    left = np.ones(len(found.lines), np.bool_)
    left[plain] = False
    for number in np.flatnonzero(left).tolist():
        line = found.lines[number]
        try:
            # The fast way: whatever fails here, for whatever reason, is examined anew.
            turns = checked_turns(loads(line[:-1], limits) if found.looks.suspect[number] else orjson.loads(line))
        except ValueError:
            offset, length = int(found.offsets[number]), len(line) - 1
            body = line[:-1].removeprefix(_BOM)
            start, kept = offset + length - len(body), len(body.rstrip())
            if number == last and found.cut:
                length = found.cut
            if not kept and length <= limits.max_line_bytes:
                scan.blank += 1
                continue
            try:
                terminated = found.terminated or number < last
                turns = _examine(body, length, terminated, limits)
            except RejectedError as error:
                scan.reject(number, error, line[:-1], offset, length, shift=start - offset)
                continue
            starts[number], lengths[number] = start, kept
        if screener is not None:
            offset, start = int(found.offsets[number]), int(starts[number])
            body = line[start - offset :][: lengths[number]]
            try:
                masked = screener.screen(body, line=number, offset=start, content=content_key(turns)[0])
            except RejectedError as error:
                # The line's head would show what nobody may see.
                scan.reject(number, error, b"", offset, len(line) - 1)
                continue
            if masked is not None:
                turns = checked_turns(masked)
        contents.add(turns)
        numbers.append(number)
    others = contents.hashes()
    of_lines = np.concatenate([plain, np.array(numbers, np.int64)])
    order = np.argsort(of_lines)
    rows = np.empty(len(order), RECORD)
    rows["content"] = np.concatenate([hashes.contents, others.contents])[order]
    rows["prompt"] = np.concatenate([hashes.prompts, others.prompts])[order]
    rows["offset"], rows["length"] = starts[of_lines[order]], lengths[of_lines[order]]
    scan.records = rows.tobytes()
    scan.screened = screener.result() if screener else None
    return scan


def loads(line: bytes, limits: Limits) -> Any:
    """Parse a line fast, without saying what is wrong with one that cannot be trained on.

    Raises:
        ValueError: over-long, no JSON, too deep, or with something in it that is ruled out.
    """
    if len(line) > limits.max_line_bytes:
        raise ValueError
    record = orjson.loads(line)
    # (bytes.rfind skips ahead, which find does not: it takes a third of the time.)
    if line.rfind(ESCAPED_NUL) >= 0:
        raise ValueError
    # Nesting takes brackets, and most records hold few. (bytes.split stops early, and finds faster than count.)
    brackets = len(line.split(b"{", limits.max_depth)) + len(line.split(b"[", limits.max_depth)) - 2
    if brackets > limits.max_depth:
        # Most of them stand in texts, such as code. (Without escaped quotes, every second piece is a text.)
        outside = b"".join(line.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
        if outside.count(b"{") + outside.count(b"[") > limits.max_depth:
            check_depth(line, limits.max_depth)
    return record


def _examine(body: bytes, length: int, terminated: bool, limits: Limits) -> list[Turn]:
    """The exact way, which decides."""
    if length > limits.max_line_bytes:
        raise RejectedError("over_long", position=limits.max_line_bytes)
    return checked_turns(diagnose(body, terminated=terminated, max_depth=limits.max_depth))


def _reject(line: bytes, offset: int, length: int, error: RejectedError, shift: int) -> bytes:
    return orjson.dumps(
        {
            "offset": offset,
            "length": length,
            "reason": error.reason,
            "field": error.field,
            "position": None if error.position is None else error.position + shift,
            # An incremental decoder leaves out a character that the cut goes through.
            "head": _Decoder("backslashreplace").decode(line[:_HEAD_BYTES]),
        }
    )


def _read_lines(task: RangeTask) -> _Lines:
    with opened(task.path) as descriptor:
        data = read_exactly(descriptor, task.end - task.start, task.start, task.path)
        if xxh3_64_intdigest(data) != task.block:
            raise changed(task.path)
        skipped = 0
        if task.start > 0 and read_exactly(descriptor, 1, task.start - 1, task.path) != b"\n":
            skipped = data.find(b"\n") + 1 or len(data)
        if skipped == len(data):
            return _Lines()
        if data.endswith(b"\n"):
            return _split(data, skipped, task.start, task.limits)
        # The last line runs on beyond the range: read its end, but keep no more of it than is allowed.
        tail_start = task.start + data.rfind(b"\n") + 1
        longest = task.limits.max_line_bytes
        rest = bytearray()
        position, terminated = task.end, False
        while position < task.size and not terminated:
            piece = read_exactly(descriptor, min(_SCAN_AHEAD, task.size - position), position, task.path)
            line_end = piece.find(b"\n")
            terminated = line_end >= 0
            piece = piece[:line_end] if terminated else piece
            position += len(piece)
            if len(rest) <= longest:
                rest += piece
        length = position - tail_start
        cut = length if length > longest else None
        return _split(b"".join((data, rest, b"\n")), skipped, task.start, task.limits, terminated, cut)


def _split(
    data: bytes, skipped: int, offset: int, limits: Limits, terminated: bool = True, cut: int | None = None
) -> _Lines:
    stream = BytesIO(data)
    stream.seek(skipped)
    # (This takes a quarter of the time of bytes.split.)
    lines = stream.readlines()
    sizes = np.fromiter(map(len, lines), np.int64, len(lines))
    ends = np.cumsum(sizes)
    characters = np.frombuffer(data, np.uint8)[skipped:]
    looks = look_at_lines(characters, ends, max_line_bytes=limits.max_line_bytes, max_depth=limits.max_depth)
    lengths = sizes - 1 - (characters[ends - 2] == ord("\r"))
    return _Lines(lines, offset + skipped + ends - sizes, lengths, looks, terminated, cut)
