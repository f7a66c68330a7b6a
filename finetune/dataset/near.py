"""Near-duplicates: records that share most of their wording.

A record is the set of its shingles: three words in a row of its texts, in Unicode NFC, without case and
punctuation; roles do not count. Two records are near-duplicates if the Jaccard similarity of their sets, the
share of shingles that both have, is at least a threshold. Candidates come from MinHash with locality-sensitive
hashing (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3): 16 bands of 6 rows
find a pair of similarity 0.8 with 99.2 % and one of 0.9 with 99.999 %. Each candidate is then compared in full,
so that nothing is called a near-duplicate that is none. Where records are made from one template, a band may be
shared by any number that are not near: a record is compared with the first 100 of a band alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest, xxh32_intdigest

from finetune.dataset.rules import Turn

if TYPE_CHECKING:
    from datasketch import MinHash

NearMode = Literal["off", "report", "drop"]
BANDS = 16
_ROWS = 6
_WORDS = 3
_WORD = re.compile(r"\w+")
_RULES_VERSION = 1
_CACHED_RECORDS = 4096
_BAND_RECORDS = 100

Shingles = frozenset[str]


@dataclass(frozen=True)
class NearDuplicate:
    """`record` is near `other`; `across`: `record` is held out and `other` trained on."""

    record: int
    other: int
    similarity: float
    across: bool


def rules() -> str:
    """What a result depends on besides the texts: our rules and the release of datasketch."""
    # Every validating process imports this module, and that one would take a sixth of its start.
    from importlib.metadata import version

    return f"{_RULES_VERSION}, datasketch {version('datasketch')}"


def shingles(turns: Sequence[Turn]) -> Shingles:
    """The record's set; a text of fewer words than a shingle has is one shingle."""
    found: set[str] = set()
    for _, text in turns:
        words = _WORD.findall(normalize("NFC", text).casefold()) or [text]
        found.update(" ".join(words[start : start + _WORDS]) for start in range(max(1, len(words) - _WORDS + 1)))
    return frozenset(found)


def jaccard(first: Shingles, second: Shingles) -> float:
    """The share of shingles that both have."""
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def bands(of: Shingles) -> bytes:
    """16 hashes of 64 bits, little-endian; records that share one are candidates."""
    signature = _empty_signature().copy()
    signature.update_batch([shingle.encode() for shingle in of])
    rows = signature.hashvalues.reshape(BANDS, _ROWS)
    return np.array([xxh3_64_intdigest(row.tobytes()) for row in rows], "<u8").tobytes()


@lru_cache(maxsize=1)
def _empty_signature() -> MinHash:
    from datasketch import MinHash

    return MinHash(num_perm=BANDS * _ROWS, seed=1, hashfunc=xxh32_intdigest, scheme="affine32")


def find_near_duplicates(
    hashes: Sequence[npt.NDArray[np.uint64]],
    kept: npt.NDArray[np.bool_],
    in_eval: npt.NDArray[np.bool_],
    shingles_of: Callable[[int], Shingles],
    *,
    threshold: float,
    drop: bool,
) -> list[NearDuplicate]:
    """Near-duplicates among the kept records, looked for in their order.

    Of those on one side, each is told with the first record that it is near to and that is none itself. Of
    those between the sides, each held-out record is told once. Memory and time grow with the candidates.

    Args:
        hashes: the files' `bands`, of shape (records, 16).
        kept: which records count, over all files.
        in_eval: which of them are held out.
        shingles_of: reads a record.
        threshold: the least similarity.
        drop: whether near-duplicates of one side leave the dataset, and so cannot stand on both.
    """
    cached = lru_cache(maxsize=_CACHED_RECORDS)(shingles_of)
    buckets = _Buckets()
    found: list[NearDuplicate] = []
    # Records that are near-duplicates already: as a copy of one on their side, and as held out but trained on.
    copies: set[int] = set()
    leaked: set[int] = set()
    for record, labels in _candidates(hashes, kept):
        held = in_eval[record]
        others = buckets.sharing(labels)
        for other in others:
            if in_eval[other] == held and other not in copies:
                similarity = jaccard(cached(record), cached(other))
                if similarity >= threshold:
                    copies.add(record)
                    found.append(NearDuplicate(record, other, similarity, across=False))
                    break
        if drop and record in copies:
            continue
        for other in others:
            # It is the held-out record that is told of, whichever came first.
            late, learned = (record, other) if held else (other, record)
            if in_eval[other] != held and late not in leaked:
                similarity = jaccard(cached(record), cached(other))
                if similarity >= threshold:
                    leaked.add(late)
                    found.append(NearDuplicate(late, learned, similarity, across=True))
        buckets.add(record, labels)
    return found


class _Buckets:
    """The first records of each band."""

    def __init__(self) -> None:
        self._records: defaultdict[int, list[int]] = defaultdict(list)

    def sharing(self, labels: list[int]) -> list[int]:
        """Records that share a band, in their order."""
        return sorted({record for label in labels for record in self._records[label]})

    def add(self, record: int, labels: list[int]) -> None:
        """Let later records find this one."""
        for label in labels:
            if len(self._records[label]) < _BAND_RECORDS:
                self._records[label].append(record)


def _candidates(hashes: Sequence[npt.NDArray[np.uint64]], kept: npt.NDArray[np.bool_]) -> list[tuple[int, list[int]]]:
    """Records that share a band with another one, in their order, with a label for each such band."""
    records = np.flatnonzero(kept)
    labels: defaultdict[int, list[int]] = defaultdict(list)
    label = 0
    for band in range(BANDS):
        values = np.concatenate([each[:, band] for each in hashes])[records]
        order = np.argsort(values, kind="stable")
        starts = np.flatnonzero(np.concatenate(([True], np.diff(values[order]) != 0)))
        sizes = np.diff(np.append(starts, len(order)))
        for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            for record in records[order[start : start + size]].tolist():
                labels[record].append(label)
            label += 1
    return sorted(labels.items())
