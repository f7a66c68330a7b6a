"""Single records of a dataset in the making, by their number over all files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from finetune.dataset.index import FileIndex
from finetune.dataset.near import Shingles, shingles
from finetune.dataset.reading import changed, opened, read_exactly
from finetune.dataset.rules import checked_turns


class RecordReader:
    """Reads records where they lie; masked ones as they are now."""

    def __init__(self, indexes: Sequence[FileIndex]) -> None:
        self._indexes = indexes
        self._starts = np.cumsum([0, *(index.records for index in indexes)])
        self._masked = lru_cache(maxsize=2)(lambda number: indexes[number].masked_lines())

    def place(self, record: int) -> dict[str, Any]:
        """The record's file, offset and length in bytes."""
        number, row = self._find(record)
        index = self._indexes[number]
        at = index.rows()[row]
        return {"file": index.file.name, "offset": int(at["offset"]), "length": int(at["length"])}

    def shingles(self, record: int) -> Shingles:
        """What near-duplicates are told by.

        Raises:
            TransientError: the file has changed since it was indexed.
        """
        number, row = self._find(record)
        index = self._indexes[number]
        line = self._masked(number).get(row)
        if line is None:
            at = index.rows()[row]
            with opened(index.file.path) as descriptor:
                line = read_exactly(descriptor, int(at["length"]), int(at["offset"]), index.file.path)
        try:
            return shingles(checked_turns(orjson.loads(line)))
        except ValueError:
            raise changed(index.file.path) from None

    def _find(self, record: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, record, side="right")) - 1
        return number, record - int(self._starts[number])
