"""What is known of each record before it is trained: its place, content, length, and how hard it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from finetune.chat.encode import EncodedRecord, RecordEncoder
from finetune.dataset.normalization import content_key
from finetune.dataset.rules import checked_turns
from finetune.dataset.screening import value_at
from finetune.errors import DatasetError
from finetune.progress import Progress, ProgressEvent
from finetune.search.curriculum.spec import CurriculumSpec
from finetune.training.data import Ints

_CHUNK = 2048
_NAMED = 5

Measure = Callable[[Sequence[EncodedRecord]], NDArray[np.float64]]


@dataclass(frozen=True)
class Records:
    """The records of a JSONL file, in their order; record `i` is the bytes ``offsets[i]`` to ``offsets[i + 1]``.

    `lengths` are tokens, `contents` hashes of the normalised content; `difficulty` is None where nobody asked, or where
    it has not been measured yet.
    """

    path: Path
    offsets: Ints
    lengths: Ints
    contents: NDArray[np.uint64]
    difficulty: NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.lengths)


def read_facts(
    path: Path,
    spec: CurriculumSpec,
    encoder: RecordEncoder,
    measure: Measure | None,
    on_progress: Progress,
    *,
    partly: bool = False,
) -> Records:
    """Read a file of training records once.

    Args:
        path: JSONL, as prepared.
        spec: what is hard.
        encoder: of the base model.
        measure: gives losses of the base model, for `by: base_loss`.
        on_progress: told of the records read.
        partly: a loss may be missing, which leaves the difficulty unknown.

    Raises:
        DatasetError: a record has no score, or nothing to learn from; it is named.
        BaseModelError: the base model cannot be loaded.
    """
    ends = [0]
    lengths: list[int] = []
    contents: list[int] = []
    values: list[float] = []
    lacking: list[str] = []
    for lines in _chunks(path):
        records = [orjson.loads(line) for line in lines]
        encoded = encoder.encode(records, first=len(lengths) + 1)
        found = _values(spec, records, encoded, measure)
        for line, record, tokens, value in zip(lines, records, encoded, found, strict=True):
            ends.append(ends[-1] + len(line))
            lengths.append(len(tokens.input_ids))
            contents.append(xxh3_64_intdigest(content_key(checked_turns(record))[0]))
            values.append(value)
            if math.isnan(value) and not (partly and spec.by == "base_loss"):
                lacking.append(f"line {len(lengths)}{_identified(record)}")
        on_progress(ProgressEvent("difficulty", len(lengths), None, "records"))
    if lacking:
        raise DatasetError(
            f"{len(lacking)} of {len(lengths)} records have {_lack(spec)}: "
            f"{', '.join(lacking[:_NAMED])}{', ...' if len(lacking) > _NAMED else ''}",
            where=path,
            remedy="Give them one, leave them out of the exports, or order by something else",
        )
    difficulty = np.array(values)
    return Records(
        path=path,
        offsets=np.array(ends, np.int64),
        lengths=np.array(lengths, np.int64),
        contents=np.array(contents, np.uint64),
        difficulty=None if spec.by is None or np.isnan(difficulty).any() else difficulty,
    )


def _chunks(path: Path) -> Iterator[list[bytes]]:
    with path.open("rb") as stream:
        while lines := list(islice(stream, _CHUNK)):
            yield lines


def _values(
    spec: CurriculumSpec, records: Sequence[Any], encoded: Sequence[EncodedRecord], measure: Measure | None
) -> list[float]:
    """How hard each record is, NaN where nobody can tell."""
    if spec.by == "score":
        return [_number(value_at(record, spec.score)) for record in records]
    if spec.by == "base_loss":
        return [math.nan] * len(records) if measure is None else list(measure(encoded).tolist())
    return [float(len(record.input_ids)) for record in encoded]


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else math.nan


def _identified(record: dict[str, Any]) -> str:
    return f" (id {record['id']})" if isinstance(record.get("id"), str | int) else ""


def _lack(spec: CurriculumSpec) -> str:
    return f"no number in {spec.score}" if spec.by == "score" else "nothing to learn from within max_length"
