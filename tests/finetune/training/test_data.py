from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from finetune.planning.models import TrialConfig
from finetune.publishing import sha256_json
from finetune.training.data import training_order
from finetune.training.identity import CODE_VERSION


def trial_of(**fields: Any) -> TrialConfig:
    return TrialConfig(trial_id="", **{"micro_batch": 4, "accumulation": 2, "epochs": 3, **fields})


LENGTHS = np.random.default_rng(0).integers(10, 500, 203)


def test_every_epoch_sees_every_record_once_up_to_what_fills_no_batch() -> None:
    order = training_order(LENGTHS, trial_of())
    assert np.bincount(order).tolist() == [3] * 203
    first = np.bincount(order[:200], minlength=203)
    assert first.max() == 1


def test_the_order_is_the_seed_s_and_differs_between_epochs() -> None:
    order = training_order(LENGTHS, trial_of())
    assert (order == training_order(LENGTHS, trial_of())).all()
    assert (order != training_order(LENGTHS, trial_of(seed=1))).any()
    assert (order[:200] != order[200:400]).any()


def test_grouping_by_length_leaves_little_padding() -> None:
    def padding(order: Any) -> float:
        batches = LENGTHS[order[: len(order) // 4 * 4]].reshape(-1, 4)
        return 1 - batches.sum() / (batches.max(axis=1) * 4).sum()

    assert padding(np.random.default_rng(0).permutation(203)) > 0.3
    assert padding(training_order(LENGTHS, trial_of())) < 0.15


def test_a_step_s_micro_batches_are_of_different_lengths() -> None:
    steps = LENGTHS[training_order(LENGTHS, trial_of(micro_batch=4, accumulation=4, epochs=1))[:192]].reshape(-1, 4, 4)
    longest_first = np.sort(steps.mean(axis=2), axis=1)[:, ::-1]
    assert (longest_first[:, 0] - longest_first[:, -1]).min() > LENGTHS.std()


def test_packed_records_stay_in_random_order() -> None:
    """Nothing of theirs is padded, and batches of one length would teach less evenly."""
    packed = LENGTHS[training_order(LENGTHS, trial_of(epochs=1, packing=True))[:200]].reshape(-1, 4)
    grouped = LENGTHS[training_order(LENGTHS, trial_of(epochs=1))[:200]].reshape(-1, 4)
    assert packed.std(axis=1).mean() > 0.7 * LENGTHS.std()
    assert grouped.std(axis=1).mean() < 0.4 * LENGTHS.std()


def test_long_and_short_batches_are_mixed() -> None:
    batches = LENGTHS[training_order(LENGTHS, trial_of(epochs=1))[:200]].reshape(-1, 4).mean(axis=1)
    assert abs(np.corrcoef(batches, np.arange(50))[0, 1]) < 0.4


@pytest.mark.parametrize(
    ("fields", "steps", "records"),
    [
        ({}, 77, 609),
        ({"epochs": 0.5}, 13, 102),
        # 576.3 records are 72 whole steps and none of a 73rd.
        ({"epochs": 2.839}, 72, 576),
        ({"max_steps": 5}, 5, 40),
        ({"max_steps": 100}, 100, 800),
    ],
)
def test_steps_and_records_agree(fields: dict[str, Any], steps: int, records: int) -> None:
    trial = trial_of(**fields)
    assert trial.steps(203) == steps
    assert len(training_order(LENGTHS, trial)) == records


def test_a_dataset_smaller_than_a_batch_is_trained_whole() -> None:
    assert np.bincount(training_order(np.array([5, 6, 7]), trial_of(micro_batch=16))).tolist() == [3, 3, 3]


@pytest.mark.parametrize("packing", [False, True])
def test_who_changes_the_order_names_trainings_anew(packing: bool) -> None:
    """A training that began in another order would go on in this one: some records twice, others never."""
    order = training_order(np.arange(40, 17, -1), trial_of(packing=packing))
    pinned = {False: "c9f7cf5605", True: "f8d3e22ab3"}
    assert (CODE_VERSION, sha256_json(order.tolist())[:10]) == (2, pinned[packing])
