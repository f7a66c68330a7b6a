"""Training records in folds, told by their content, and the dataset without one of them."""

from __future__ import annotations

from array import array

import numpy as np
from xxhash import xxh3_64_intdigest

from finetune.dataset.chosen import choose_records
from finetune.dataset.models import PreparedDataset
from finetune.errors import DatasetError
from finetune.layout import DataLayout


def fold_of(line: bytes, count: int) -> int:
    """The fold of a record, from 0: it stays in it whatever else is in the file."""
    return xxh3_64_intdigest(line.rstrip(b"\n")) % count


def without_fold(dataset: PreparedDataset, fold: int, count: int, layout: DataLayout) -> PreparedDataset:
    """The dataset without the training records of one fold, published or taken as it was published before.

    Args:
        dataset: the whole one.
        fold: the fold that is left out, from 0.
        count: of how many.
        layout: where it is published.

    Raises:
        DatasetError: the fold holds no record, or all of them.
        StorageFullError: the disk is full.
    """
    folds, ends = array("q"), array("q", [0])
    with dataset.train_path.open("rb") as lines:
        for line in lines:
            folds.append(fold_of(line, count))
            ends.append(ends[-1] + len(line))
    rows = np.flatnonzero(np.frombuffer(folds, np.int64) != fold)
    if len(rows) in (0, len(folds)):
        raise DatasetError(
            f"fold {fold + 1} of {count} holds {'no record' if len(rows) else 'all records'}",
            where=dataset.train_path,
            remedy="Take fewer folds, or bring more data",
        )
    return choose_records(dataset, rows, np.frombuffer(ends, np.int64), layout)
