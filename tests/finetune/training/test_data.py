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


def test_every_epoch_sees_every_record_once_up_to_what_fills_no_batch() -> None:
    order = training_order(203, trial_of())
    assert np.bincount(order).tolist() == [3] * 203
    first = np.bincount(order[:200], minlength=203)
    assert first.max() == 1


def test_the_order_is_the_seed_s_and_differs_between_epochs() -> None:
    order = training_order(203, trial_of())
    assert (order == training_order(203, trial_of())).all()
    assert (order != training_order(203, trial_of(seed=1))).any()
    assert (order[:200] != order[200:400]).any()


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
    assert len(training_order(203, trial)) == records


def test_a_dataset_smaller_than_a_batch_is_trained_whole() -> None:
    assert np.bincount(training_order(3, trial_of(micro_batch=16))).tolist() == [3, 3, 3]


def test_who_changes_the_order_names_trainings_anew() -> None:
    """A training that began in another order would go on in this one: some records twice, others never."""
    order = training_order(23, trial_of())
    assert (CODE_VERSION, sha256_json(order.tolist())[:10]) == (3, "f8d3e22ab3")
