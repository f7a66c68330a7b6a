"""Stopping trials early by what they reach at fractions of their training.

A training is measured after a ninth and a third of its steps; of the trials that come so far, the best third
goes on (asynchronous successive halving, Li et al. 2020; with brackets, Hyperband, Li et al. 2018).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from finetune.search.models import Strategy

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

FACTOR = 3
# What a whole training counts as.
WHOLE = FACTOR**2


def rungs(total_steps: int) -> dict[int, int]:
    """The steps after which a training is measured, with the ninths of it that they stand for.

    A training of fewer than nine steps has fewer of them; the end is no rung, because nothing is left to save.
    """
    found: dict[int, int] = {}
    for ninths in (1, FACTOR):
        step = round(total_steps * ninths / WHOLE)
        if 0 < step < total_steps:
            found.setdefault(step, ninths)
    return found


def pruner_of(strategy: Strategy, *, hyperband: bool) -> BasePruner:
    """Optuna's pruner for a strategy: only ``halving`` has one."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.pruners import HyperbandPruner, NopPruner, SuccessiveHalvingPruner

    if strategy != "halving":
        return NopPruner()
    if not hyperband:
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=FACTOR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return HyperbandPruner(min_resource=1, max_resource=WHOLE, reduction_factor=FACTOR)
