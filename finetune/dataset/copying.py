"""Copies of what an index points to: records as raw bytes, rejects with the file's name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import orjson

from finetune.dataset.index import FileIndex
from finetune.dataset.reading import verified_blocks
from finetune.hashed_file import HashedFile


def copy_records(index: FileIndex, outputs: Sequence[tuple[npt.NDArray[np.bool_], HashedFile]]) -> None:
    """Write the chosen records of one file, each with a line feed, to their outputs; masked ones as they are now.

    Raises:
        DatasetError: the file cannot be read.
        TransientError: it has changed since it was indexed.
    """
    rows = index.rows()
    starts = rows["offset"].astype(np.int64)
    ends = starts + rows["length"]
    masked = index.masked_lines()
    altered = np.array(sorted(masked), np.int64)
    row = position = base = 0
    buffer = b""
    for block in verified_blocks(index.file.path, index.fingerprint):
        buffer += block
        position += len(block)
        upto = int(np.searchsorted(ends, position, side="right"))
        for chosen, output in outputs:
            here = np.flatnonzero(chosen[row:upto]) + row
            for part in _apart(here, altered):
                if len(part) == 1 and int(part[0]) in masked:
                    output.append(masked[int(part[0])] + b"\n")
                    continue
                for start, end in _runs(starts[part] - base, ends[part] - base):
                    # Within JSON a carriage return can only be white space; many readers break lines there.
                    output.append(buffer[start:end].replace(b"\r", b" "))
                    output.append(b"\n")
        row = upto
        unread = min(int(starts[row]), position) if row < len(starts) else position
        buffer, base = buffer[unread - base :], unread


def _apart(rows: npt.NDArray[np.int64], single: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Rows in pieces, so that each of `single` has one of its own."""
    at = np.flatnonzero(np.isin(rows, single)) if len(single) else single
    return np.split(rows, np.union1d(at, at + 1)) if len(at) else [rows]


def _runs(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Neighbours with nothing but a line feed between them become one stretch of bytes."""
    if not len(starts):
        return iter(())
    breaks = np.flatnonzero(ends[:-1] + 1 != starts[1:])
    first = starts[np.concatenate(([0], breaks + 1))]
    last = ends[np.concatenate((breaks, [len(ends) - 1]))]
    return zip(first.tolist(), last.tolist(), strict=True)


def copy_entries(index: FileIndex, entries: Path, output: BinaryIO) -> None:
    """Write what was noted of a file's lines, each with the file's name; there may be no such notes."""
    prefix = orjson.dumps({"file": index.file.name})[:-1] + b","
    with contextlib.suppress(FileNotFoundError), entries.open("rb") as lines:
        for line in lines:
            output.write(prefix + line[1:])
