"""Copies of what an index points to: records as raw bytes, rejects with the file's name."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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
    altered = np.zeros(len(rows), np.bool_)
    altered[list(masked)] = True
    row = position = base = 0
    buffer = b""
    for block in verified_blocks(index.file.path, index.fingerprint):
        buffer += block
        position += len(block)
        upto = int(np.searchsorted(ends, position, side="right"))
        view = memoryview(buffer)
        for chosen, output in outputs:
            here = np.flatnonzero(chosen[row:upto]) + row
            if not len(here):
                continue
            # Neighbours with nothing but a line feed between them are one stretch of bytes.
            apart = (ends[here[:-1]] + 1 != starts[here[1:]]) | altered[here[:-1]] | altered[here[1:]]
            breaks = np.flatnonzero(apart)
            first, last = here[np.append(0, breaks + 1)], here[np.append(breaks, len(here) - 1)]
            places = zip((starts[first] - base).tolist(), (ends[last] - base).tolist(), strict=True)
            stretches: list[bytes | memoryview] = [view[start:end] for start, end in places]
            for number in np.flatnonzero(altered[first]).tolist():
                stretches[number] = masked[int(first[number])]
            # Within JSON a carriage return can only be white space; many readers break lines there.
            output.append(b"\n".join([*stretches, b""]).replace(b"\r", b" "))
        row = upto
        unread = min(int(starts[row]), position) if row < len(starts) else position
        buffer, base = buffer[unread - base :], unread


def copy_entries(index: FileIndex, entries: Path, output: BinaryIO) -> None:
    """Write what was noted of a file's lines, each with the file's name; there may be no such notes."""
    prefix = orjson.dumps({"file": index.file.name})[:-1] + b","
    with contextlib.suppress(FileNotFoundError), entries.open("rb") as lines:
        for line in lines:
            output.write(prefix + line[1:])
