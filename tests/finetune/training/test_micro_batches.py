from __future__ import annotations

import numpy as np
import pytest

from finetune.errors import ConfigurationError
from finetune.training.data import Ints
from finetune.training.micro_batches import micro_batches, shared

LENGTHS = np.random.default_rng(0).lognormal(4, 0.8, 203).astype(np.int64) + 10
EFFECTIVE, MICRO = 16, 4


def steps_of(lengths: Ints, *, micro_batch: int = MICRO, processes: int = 1) -> list[list[list[int]]]:
    """Every step's micro-batches, the processes' in turn."""
    of_ranks = [
        list(micro_batches(lengths, EFFECTIVE, micro_batch, rank=r, processes=processes)) for r in range(processes)
    ]
    accumulation = EFFECTIVE // (micro_batch * processes)
    starts = range(0, len(of_ranks[0]), accumulation)
    return [[batch for own in of_ranks for batch in own[start : start + accumulation]] for start in starts]


def padded(lengths: Ints, batches: list[list[int]]) -> int:
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("count", [202, 192, 194, 206, 10, 2])
def test_every_step_sees_its_own_records_once_shared_by_all_processes(
    count: int, processes: int, micro_batch: int
) -> None:
    if micro_batch * processes > EFFECTIVE:
        return
    lengths = np.resize(LENGTHS, count)
    steps = steps_of(lengths, micro_batch=micro_batch, processes=processes)
    seen = [sorted(place for batch in step for place in batch) for step in steps]
    assert seen == [list(range(at, min(at + EFFECTIVE, count))) for at in range(0, count, EFFECTIVE)]
    for rank in range(processes):
        sampler = micro_batches(lengths, EFFECTIVE, micro_batch, rank=rank, processes=processes)
        assert len(sampler) == len(list(sampler)) == sum(len(step) for step in steps) // processes
        assert all(batch for batch in sampler)


def test_little_is_padded_although_steps_are_random() -> None:
    random = [list(range(at, at + MICRO)) for at in range(0, 192, MICRO)]
    ours = [batch for step in steps_of(LENGTHS[:192]) for batch in step]
    tokens = int(LENGTHS[:192].sum())
    assert padded(LENGTHS, random) > 1.5 * tokens
    assert padded(LENGTHS, ours) < 1.2 * tokens


def test_a_single_long_record_stands_alone() -> None:
    lengths = np.full(EFFECTIVE, 30)
    lengths[5] = 1000
    [step] = steps_of(lengths)
    assert [5] in step
    assert len(step) == EFFECTIVE // MICRO


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_no_micro_batch_needs_more_than_its_records_at_their_longest(micro_batch: int) -> None:
    """The plan's estimate of the memory holds."""
    for step in steps_of(LENGTHS, micro_batch=micro_batch):
        assert max(padded(LENGTHS, [batch]) for batch in step) <= micro_batch * LENGTHS.max()


def test_all_processes_get_as_many_records() -> None:
    order = np.arange(203)
    assert len(shared(order, 1)) == 203
    assert shared(order, 4).tolist() == list(range(200))
    with pytest.raises(ConfigurationError, match="sees 203 records, fewer than its 204 processes"):
        shared(order, 204)
