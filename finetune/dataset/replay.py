"""What is new in a dataset to someone who knows an earlier one, mixed with a sample of what is not: experience replay.

Training on new data alone forgets the old; a share of old data among the new prevents most of it (Rolnick et al.,
"Experience Replay for Continual Learning", NeurIPS 2019). A few per cent do where old and new are alike, a quarter
where they differ much (Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language
Models", TMLR 2024: 5 % and 25 %).
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
from xxhash import xxh3_64_intdigest

from finetune.dataset.chosen import choose_records
from finetune.dataset.models import PreparedDataset
from finetune.dataset.normalization import content_key
from finetune.dataset.rules import checked_turns
from finetune.errors import ArtifactError
from finetune.layout import DataLayout


class Replay(NamedTuple):
    """A dataset of which `new` and `replayed` records are trained on, out of `earlier` that could be replayed."""

    dataset: PreparedDataset
    new: int
    replayed: int
    earlier: int


def new_and_replayed(
    dataset: PreparedDataset, known: PreparedDataset, *, fraction: float, layout: DataLayout
) -> Replay | None:
    """The training records that `known` has not, and of the others a sample; None where nothing is new.

    The sample is the records whose content and date have the lowest hashes: equal datasets give an equal sample, and
    another date another one. Records keep their order and bytes; the held-out records are the dataset's own.

    Args:
        dataset: the date's.
        known: what was learned before.
        fraction: share of the replayed records in the whole, from 0 to below 1; fewer if there are not as many.
        layout: where it is published, beside the dataset.

    Raises:
        ArtifactError: a dataset is damaged.
        StorageFullError: the disk is full.
    """
    contents, offsets = _digests(dataset.train_path)
    chosen = ~np.isin(contents, _digests(known.train_path)[0])
    new = int(chosen.sum())
    if not new:
        return None
    earlier = np.flatnonzero(~chosen)
    replayed = min(len(earlier), round(new * fraction / (1 - fraction)))
    ranks = _digests(dataset.train_path, salt=dataset.date)[0][earlier]
    chosen[earlier[np.argsort(ranks, kind="stable")[:replayed]]] = True
    mixed = choose_records(dataset, np.flatnonzero(chosen), offsets, layout)
    return Replay(mixed, new, replayed, len(earlier))


def known_lines(records: Path, known: Path) -> npt.NDArray[np.bool_]:
    """Which lines of a file hold records whose content stands in another one too; shape (lines,).

    Raises:
        ArtifactError: a line is no record.
    """
    return np.isin(_digests(records)[0], _digests(known)[0])


def _digests(path: Path, *, salt: str = "") -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """A hash of each record's content, shape (lines,), and where lines begin and the last ends, shape (lines + 1,).

    Raises:
        ArtifactError: a line is no record.
    """
    seed = xxh3_64_intdigest(salt.encode())
    digests, ends = array("Q"), array("q", [0])
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                # As duplicates are told: another id makes no other record.
                content, _ = content_key(checked_turns(orjson.loads(line)))
            except ValueError as error:
                raise ArtifactError(
                    f"line {number} of a published dataset is no record: {error}",
                    where=path,
                    remedy="Delete its directory and prepare the dataset again",
                ) from error
            digests.append(xxh3_64_intdigest(content, seed=seed))
            ends.append(ends[-1] + len(line))
    return np.asarray(digests, np.uint64), np.asarray(ends, np.int64)
