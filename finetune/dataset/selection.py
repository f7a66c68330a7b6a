"""Which records are kept, and on which side of the split: decided on hashes and other kept keys alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from finetune.dataset.deletions import Deletions, id_hashes
from finetune.dataset.index import FileIndex
from finetune.dataset.lookup import RecordReader
from finetune.dataset.near import NearDuplicate, find_near_duplicates
from finetune.dataset.parameters import PrepareParameters

# Hashes sorted at a time: about 50 MB.
_PARTITION_RECORDS = 1 << 20


@dataclass(frozen=True)
class Selection:
    """What becomes of each record, in the order of files and lines.

    A record is kept, or it is one of the next four; `in_eval` is the side that it has, or would have.
    """

    kept: npt.NDArray[np.bool_]
    duplicates: npt.NDArray[np.bool_]
    near_duplicates: npt.NDArray[np.bool_]
    removed: npt.NDArray[np.bool_]
    filtered: npt.NDArray[np.bool_]
    in_eval: npt.NDArray[np.bool_]
    # Pairs that were found, if any were looked for, whether or not they led to a record being dropped.
    near: list[NearDuplicate]


def select_records(indexes: Sequence[FileIndex], deletions: Deletions, parameters: PrepareParameters) -> Selection:
    """Decide about every record; what is left out for another reason is nobody's first occurrence.

    Args:
        indexes: the files, in their order, screened for whatever `parameters` ask for.
        deletions: what must not be learned.
        parameters: the split, the least quality, and whether to look for near-duplicates.

    Raises:
        TransientError: a file has changed since it was indexed.
    """
    nothing = np.zeros(sum(index.records for index in indexes), np.bool_)
    removed = deleted(indexes, deletions) if deletions else nothing
    filtered = nothing
    if parameters.min_quality is not None:
        # NaN, which stands for none, is not at least anything.
        filtered = ~(np.concatenate([index.keys()["quality"] for index in indexes]) >= parameters.min_quality)
        filtered &= ~removed
    left_out = removed | filtered
    kept = first_occurrences(indexes, left_out)
    in_eval = np.concatenate(
        [held_out(index.rows()["prompt"], parameters.eval_fraction, parameters.salt) for index in indexes]
    )
    duplicates, dropped, near = ~kept & ~left_out, nothing, []
    if parameters.near_duplicates != "off":
        drop = parameters.near_duplicates == "drop"
        near = find_near_duplicates(
            [index.bands() for index in indexes],
            kept,
            in_eval,
            RecordReader(indexes).shingles,
            threshold=parameters.near_threshold,
            drop=drop,
        )
        if drop:
            dropped = nothing.copy()
            dropped[[pair.record for pair in near if not pair.across]] = True
            kept &= ~dropped
    return Selection(kept, duplicates, dropped, removed, filtered, in_eval, near)


def first_occurrences(
    indexes: Sequence[FileIndex],
    passed_over: npt.NDArray[np.bool_],
    partition_records: int = _PARTITION_RECORDS,
) -> npt.NDArray[np.bool_]:
    """Which records are the first with their content, over all files in their order.

    Memory does not grow with the hashes: those with the same leading bits are compared at a time.

    Args:
        indexes: the files.
        passed_over: records that are not compared, and never first.
        partition_records: how many records are compared at a time, about.

    Returns:
        One value a record, in the order of files and lines.
    """
    total = sum(index.records for index in indexes)
    first = ~passed_over
    partitions = np.uint64(-(-total // partition_records))
    for partition in range(int(partitions)):
        contents, positions = [], []
        start = 0
        for index in indexes:
            content = np.asarray(index.rows()["content"])
            compared = first[start : start + index.records]
            here = np.flatnonzero((content[:, 0] % partitions == partition) & compared)
            contents.append(content[here])
            positions.append(here + start)
            start += index.records
        content, position = np.concatenate(contents), np.concatenate(positions)
        shared = _repeated(content[:, 0])
        content, position = content[shared], position[shared]
        # The sort is stable, so that among equals the earliest stays in front.
        order = np.lexsort((content[:, 1], content[:, 0]))
        content = content[order]
        repeats = (content[1:] == content[:-1]).all(axis=1)
        first[position[order[1:]][repeats]] = False
    return first


def _repeated(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which values are there more than once: numpy sorts one column of numbers ten times as fast as pairs."""
    order = np.argsort(np.ascontiguousarray(values))
    alike = values[order[1:]] == values[order[:-1]]
    repeated = np.zeros(len(values), np.bool_)
    repeated[order[1:][alike]] = repeated[order[:-1][alike]] = True
    return repeated


def deleted(indexes: Sequence[FileIndex], deletions: Deletions) -> npt.NDArray[np.bool_]:
    """Which records are on the deletion list, or have the content of one whose id is.

    Returns:
        One value a record, in the order of files and lines.
    """
    ids = np.array(id_hashes(deletions), np.uint64)
    contents = set(deletions.contents)
    for index in indexes:
        keys = index.keys()
        contents |= {each.tobytes() for each in keys["arrived"][np.isin(keys["id"], ids)]}
    # What was masked is known by both of its contents.
    return np.concatenate(
        [_among(index.keys()["arrived"], contents) | _among(index.rows()["content"], contents) for index in indexes]
    )


def _among(hashes: npt.NDArray[np.uint64], wanted: Collection[bytes]) -> npt.NDArray[np.bool_]:
    halves = np.frombuffer(b"".join(sorted(wanted)), "<u8").reshape(-1, 2)
    found = np.isin(hashes[:, 0], halves[:, 0])
    for position in np.flatnonzero(found):
        found[position] = hashes[position].tobytes() in wanted
    return found


def held_out(prompts: npt.NDArray[np.uint64], eval_fraction: float, salt: str) -> npt.NDArray[np.bool_]:
    """Which records are for evaluation: a function of the prompt's hash, the salt and the fraction alone.

    The hash is mixed with the salt's by SplitMix64's finalizer (Steele, Lea and Flood 2014).
    """
    mixed = prompts ^ np.uint64(xxh3_64_intdigest(salt.encode()))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed < np.uint64(int(eval_fraction * 2**64))
