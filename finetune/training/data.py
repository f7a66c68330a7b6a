"""Training records as flat arrays of tokens and labels, and the order in which they are trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson

from finetune.chat.encode import EncodedRecord, RecordEncoder
from finetune.errors import TrainingError
from finetune.planning.models import TrialConfig

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED_LABEL = -100
_CHUNK = 2048
_NAMED = 5

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingData:
    """All records, one behind the other: record `i` is ``input_ids[offsets[i]:offsets[i + 1]]``.

    `labels` are the tokens where the loss counts, else -100; `lines` number the records' lines in the
    dataset from 1; `truncated` counts the records that were cut to the maximal length.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    offsets: Ints
    lines: Ints
    truncated: int

    @property
    def lengths(self) -> Ints:
        """Tokens of each record."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.lines)

    def as_dataset(self) -> Dataset:
        """The records as a `datasets.Dataset` with the columns ``input_ids`` and ``labels``."""
        import pyarrow
        from datasets import Dataset

        def column(values: npt.NDArray[np.int32]) -> Any:
            return pyarrow.LargeListArray.from_arrays(self.offsets, values)

        return Dataset(pyarrow.table({"input_ids": column(self.input_ids), "labels": column(self.labels)}))


def read_training_data(path: Path, encoder: RecordEncoder, max_length: int) -> TrainingData:
    """Encode all records of a JSON Lines file, cut to `max_length` tokens.

    Raises:
        TrainingError: there is no record, or a record has nothing to learn from, within `max_length` or
            at all.
        BaseModelError: conversations came and the model has no chat template.
        DatasetError: the chat template refuses a record.
    """
    ids: list[npt.NDArray[np.int32]] = []
    labels: list[npt.NDArray[np.int32]] = []
    lengths: list[int] = []
    silent: list[str] = []
    needed = truncated = 0
    for first, records in _chunks(path):
        for number, record in enumerate(encoder.encode(records, first=first), start=first):
            tokens, mask = np.array(record.input_ids, np.int32), np.array(record.trained_mask, bool)
            truncated += len(tokens) > max_length
            if not mask[1:max_length].any():
                silent.append(f"line {number} ({_why_silent(record)})")
                needed = max(needed, _first_trained(record) + 1)
                continue
            ids.append(tokens[:max_length])
            labels.append(np.where(mask, tokens, IGNORED_LABEL)[:max_length].astype(np.int32))
            lengths.append(len(ids[-1]))
    if silent:
        raise TrainingError(
            f"{len(silent)} of {len(silent) + len(lengths)} records have nothing to learn from within max_length "
            f"{max_length}: {', '.join(silent[:_NAMED])}{', ...' if len(silent) > _NAMED else ''}",
            where=path,
            remedy=f"Raise max_length to at least {needed + 1}, or take these records out"
            if needed > max_length
            else "Take these records out, or give them an answer",
        )
    if not lengths:
        raise TrainingError("there is no record to train on", where=path, remedy="Add exports, or look at the rejects")
    return TrainingData(
        input_ids=np.concatenate(ids),
        labels=np.concatenate(labels),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        lines=np.arange(1, len(lengths) + 1),
        truncated=truncated,
    )


def _chunks(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    number = 1
    with path.open("rb") as stream:
        while records := [orjson.loads(line) for line in islice(stream, _CHUNK)]:
            yield number, records
            number += len(records)


def _first_trained(record: EncodedRecord) -> int:
    return record.trained_mask.index(1, 1) if 1 in record.trained_mask[1:] else 0


def _why_silent(record: EncodedRecord) -> str:
    first = _first_trained(record)
    return f"the answer begins at token {first + 1} of {len(record.input_ids)}" if first else "no answer"


def training_order(count: int, trial: TrialConfig) -> Ints:
    """The indices of all records that a training on `count` of them sees, step after step.

    Every epoch is a new permutation; what does not fill a step goes over to the next one. The order depends on nothing
    but the arguments: whoever resumes at a step knows what was trained before it, and which records a step saw.
    """
    wanted = trial.records_seen(count)
    epochs = range(math.ceil(wanted / count))
    return np.concatenate([np.random.default_rng([trial.seed, epoch]).permutation(count) for epoch in epochs])[:wanted]
