"""Which records are kept, and on which side of the split: decided on hashes alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from finetune.dataset.index import FileIndex

# Hashes sorted at a time: about 50 MB.
_PARTITION_RECORDS = 1 << 20


def first_occurrences(
    indexes: Sequence[FileIndex], partition_records: int = _PARTITION_RECORDS
) -> npt.NDArray[np.bool_]:
    """Which records are the first with their content, over all files in their order.

    Memory does not grow with the hashes: those with the same leading bits are compared at a time.

    Returns:
        One value a record, in the order of files and lines.
    """
    total = sum(index.records for index in indexes)
    first = np.ones(total, np.bool_)
    partitions = np.uint64(-(-total // partition_records))
    for partition in range(int(partitions)):
        contents, positions = [], []
        start = 0
        for index in indexes:
            content = np.asarray(index.rows()["content"])
            here = np.flatnonzero(content[:, 0] % partitions == partition)
            contents.append(content[here])
            positions.append(here + start)
            start += index.records
        content, position = np.concatenate(contents), np.concatenate(positions)
        # The sort is stable, so that among equals the earliest stays in front.
        order = np.lexsort((content[:, 1], content[:, 0]))
        content = content[order]
        repeats = (content[1:] == content[:-1]).all(axis=1)
        first[position[order[1:]][repeats]] = False
    return first


def held_out(prompts: npt.NDArray[np.uint64], eval_fraction: float, salt: str) -> npt.NDArray[np.bool_]:
    """Which records are for evaluation: a function of the prompt's hash, the salt and the fraction alone.

    The hash is mixed with the salt's by SplitMix64's finalizer (Steele, Lea and Flood 2014).
    """
    mixed = prompts ^ np.uint64(xxh3_64_intdigest(salt.encode()))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed < np.uint64(int(eval_fraction * 2**64))
