"""Copies of what an index points to: records as raw bytes, rejects with the file's name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import orjson

from finetune.dataset.index import FileIndex
from finetune.dataset.reading import verified_blocks


def copy_records(index: FileIndex, outputs: Sequence[tuple[npt.NDArray[np.bool_], BinaryIO]]) -> None:
    """Write the chosen records of one file, each with a line feed, to their outputs.

    Raises:
        DatasetError: the file cannot be read.
        TransientError: it has changed since it was indexed.
    """
    rows = index.rows()
    starts = rows["offset"].astype(np.int64)
    ends = starts + rows["length"]
    row = position = base = 0
    buffer = b""
    for block in verified_blocks(index.file.path, index.fingerprint):
        buffer += block
        position += len(block)
        upto = int(np.searchsorted(ends, position, side="right"))
        for chosen, output in outputs:
            here = np.flatnonzero(chosen[row:upto]) + row
            for start, end in _runs(starts[here] - base, ends[here] - base):
                # Within JSON a carriage return can only be white space; many readers break lines there.
                output.write(buffer[start:end].replace(b"\r", b" "))
                output.write(b"\n")
        row = upto
        unread = min(int(starts[row]), position) if row < len(starts) else position
        buffer, base = buffer[unread - base :], unread


def _runs(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Neighbours with nothing but a line feed between them become one stretch of bytes."""
    if not len(starts):
        return iter(())
    breaks = np.flatnonzero(ends[:-1] + 1 != starts[1:])
    first = starts[np.concatenate(([0], breaks + 1))]
    last = ends[np.concatenate((breaks, [len(ends) - 1]))]
    return zip(first.tolist(), last.tolist(), strict=True)


def copy_rejects(index: FileIndex, output: BinaryIO) -> None:
    """Write a file's rejects, each with the file's name."""
    prefix = orjson.dumps({"file": index.file.name})[:-1] + b","
    with index.rejects_path.open("rb") as rejects:
        for reject in rejects:
            output.write(prefix + reject[1:])
