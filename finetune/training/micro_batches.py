"""Which records of an optimizer step go through the model together, and in which process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from finetune.errors import ConfigurationError
from finetune.training.data import Ints


def shared(order: Ints, processes: int) -> Ints:
    """The order, cut to as many records for every process.

    Raises:
        ConfigurationError: there are fewer records than processes.
    """
    if len(order) < processes:
        raise ConfigurationError(
            f"the training sees {len(order)} records, fewer than its {processes} processes",
            where="TRAIN_PROCESSES",
            remedy="Train so few records in one process",
        )
    return order[: len(order) // processes * processes]


def micro_batches(lengths: Ints, effective_batch: int, micro_batch: int, *, rank: int = 0, processes: int = 1) -> Any:
    """A `transformers.trainer_pt_utils.BatchRebalanceSampler` of one process's micro-batches.

    A step holds the records that stand at its place, whatever their lengths: it learns what a step of random records
    does. Sorted by length they are cut into as many micro-batches as `micro_batch` records each would make, of about
    equal cost: a few long records, or many short ones. So little is padded.

    Args:
        lengths: tokens of the records in the order in which they are trained; `shared` among the processes.
        effective_batch: records of an optimizer step; a multiple of `micro_batch` times the processes.
        micro_batch: records of a micro-batch, in the mean.
        rank: the process's number.
        processes: how many there are.
    """
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    accumulation = effective_batch // (micro_batch * processes)
    split = {"effective_batch_size": effective_batch, "dp_size": processes, "grad_accum": accumulation, "rank": rank}
    whole = len(lengths) // effective_batch * effective_batch
    last = range(whole, len(lengths))
    # The library would repeat records in a last step that has too few.
    count = math.ceil(len(last) / (micro_batch * processes)) * processes
    rest = [list(last[number::count]) for number in range(rank, count, processes)]

    class Sampler(BatchRebalanceSampler):  # type: ignore[misc]  # transformers is untyped here
        """Cuts a step when it is due: Python's lists of all records would take gigabytes."""

        def __iter__(self) -> Iterator[list[int]]:
            for start in range(0, whole, effective_batch):
                step = lengths[start : start + effective_batch].tolist()
                for batch in BatchRebalanceSampler(step, **split, shuffle=False):
                    yield [start + place for place in batch]
            yield from rest

        def __len__(self) -> int:
            return whole // effective_batch * accumulation + len(rest)

    return Sampler([], **split)
