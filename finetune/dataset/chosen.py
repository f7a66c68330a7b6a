"""Chosen training records of a prepared dataset, as a prepared dataset of its own with the same held-out records."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.dataset.models import Counts, PreparedDataset
from finetune.dataset.prepare import KIND, load_prepared
from finetune.errors import ArtifactError
from finetune.hashed_file import HashedFile
from finetune.layout import DataLayout
from finetune.publishing import is_complete, publish_directory, read_manifest, sha256_json

# Part of a fingerprint: raise it when the same choice comes to be written otherwise.
_METHOD = 1


def choose_records(
    source: PreparedDataset, rows: NDArray[np.int64], offsets: NDArray[np.int64], layout: DataLayout
) -> PreparedDataset:
    """Publish some training records of a dataset, in the order given, or take what was published before.

    Args:
        source: the dataset that they are of.
        rows: numbers of its training records from 0; one may come more than once.
        offsets: where each record begins in ``train.jsonl``, and behind the last one where that ends; shape
            (records + 1,).
        layout: where it is published.

    Raises:
        StorageFullError: the disk is full.
    """
    chosen = hashlib.sha256(np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest()
    fingerprint = sha256_json([_METHOD, source.fingerprint, chosen])[: len(source.fingerprint)]
    target = layout.prepared(source.date, fingerprint)
    if is_complete(target):
        # One that was damaged since is made again.
        with contextlib.suppress(ArtifactError):
            return load_prepared(target).model_copy(update={"reused": True})
    # Whoever was first has published the same bytes.
    with contextlib.suppress(FileExistsError), publish_directory(target, kind=KIND, replace=target.exists()) as staging:
        with HashedFile(staging.path / "train.jsonl") as train, source.train_path.open("rb") as lines:
            for row in rows.tolist():
                lines.seek(int(offsets[row]))
                train.append(lines.read(int(offsets[row + 1] - offsets[row])))
        link_or_copy(source.eval_path, staging.path / "eval.jsonl")
        (staging.path / "rejects.jsonl").touch()
        part = PreparedDataset(
            path=target,
            date=source.date,
            fingerprint=fingerprint,
            window_dates=source.window_dates,
            counts=Counts(
                lines=len(rows) + source.counts.eval,
                train=len(rows),
                eval=source.counts.eval,
                duplicates=0,
                rejected=0,
                blank=0,
            ),
            rejects_by_reason={},
            rejects_by_file={},
            records_by_file=_by_file(source, rows),
        )
        staging.digests = {"train.jsonl": train.sha256}
        staging.inputs = {"dataset": source.fingerprint, "chosen": chosen}
        staging.results = part.model_dump(mode="json", exclude={"path", "reused"})
    return load_prepared(target)


def trained_by_file(dataset: PreparedDataset) -> dict[str, int]:
    """How many training records each export gave; they stand in ``train.jsonl`` in this order.

    Raises:
        ArtifactError: the dataset's manifest is missing or damaged.
    """
    return {file["name"]: file["train"] for file in read_manifest(dataset.path, kind=KIND).inputs["files"]}


def link_or_copy(source: Path, target: Path) -> None:
    """The same content at another place, as a hard link where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _by_file(source: PreparedDataset, rows: NDArray[np.int64]) -> dict[str, int]:
    counts = trained_by_file(source)
    file_of = np.searchsorted(np.cumsum(list(counts.values())), rows, side="right")
    found = np.bincount(file_of, minlength=len(counts)).tolist()
    return {name: count for name, count in zip(counts, found, strict=True) if count}
