"""The next configuration to try, by Optuna's samplers: a pure function of what was tried."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from finetune.planning.models import Range
from finetune.search.ledger import best_trial
from finetune.search.models import Strategy, TrialRecord, Value
from finetune.search.space import Space, bounds, dimensions, distribution, refuse_bad_space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

Sampler = Literal["tpe", "gp"]
# Before so many trials there is nothing to learn from.
_RANDOM_TRIALS = 3
_EXPLORE = 0.2
# Of a range's width: how far a neighbour of the best configuration lies, as one standard deviation.
_NEIGHBOURHOOD = 0.1


def suggest(
    trial_history: Sequence[TrialRecord],
    search_space: Space,
    strategy: Strategy,
    budget_remaining: float,
    trials_remaining: int,
    *,
    seed: int = 0,
    sampler: Sampler = "tpe",
) -> dict[str, Value] | None:
    """The next trial's configuration; equal arguments give equal ones.

    Args:
        trial_history: all trials so far, also those that run, fewer being better.
        search_space: ranges by name; values of another method than the one chosen are left out.
        strategy: ``random``; ``bayesian`` (random for the first three trials, then Optuna's sampler);
            ``bandit`` (epsilon-greedy: four times in five a neighbour of the best trial, else random);
            ``halving`` (random: what it stops early is `finetune.search.pruning`'s).
        budget_remaining: GPU-hours that a trial may still take.
        trials_remaining: how many trials may still start.
        seed: of everything random.
        sampler: what ``bayesian`` draws by: ``tpe`` (Bergstra et al. 2011, multivariate: Falkner et al. 2018)
            or ``gp`` (a Gaussian process, which needs torch and scipy).

    Returns:
        Values by their names in the space, or None when budget or trials are spent.

    Raises:
        ConfigurationError: a range cannot be drawn from.
    """
    refuse_bad_space(search_space)
    if budget_remaining <= 0 or trials_remaining <= 0:
        return None
    state = int(np.random.SeedSequence([seed, len(trial_history)]).generate_state(1)[0])
    best = best_trial(trial_history)
    if strategy == "bandit" and best is not None:
        generator = np.random.default_rng(state)
        if generator.random() >= _EXPLORE:
            return _neighbour(best.params, search_space, generator)
    learns = strategy == "bayesian" and len(trial_history) >= _RANDOM_TRIALS
    return _drawn(trial_history if learns else [], search_space, _sampler(sampler if learns else None, state))


def _sampler(kind: Sampler | None, seed: int) -> BaseSampler:
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import GPSampler, RandomSampler, TPESampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match kind:
            case "tpe":
                # group: dimensions that only some methods have are learned from those methods' trials.
                return TPESampler(n_startup_trials=1, multivariate=True, group=True, constant_liar=True, seed=seed)
            case "gp":
                # What it cannot model, as dimensions of one method alone, is drawn by itself.
                return GPSampler(n_startup_trials=1, seed=seed, warn_independent_sampling=False)
            case None:
                return RandomSampler(seed=seed)


def _drawn(history: Sequence[TrialRecord], space: Space, sampler: BaseSampler) -> dict[str, Value]:
    study = study_of(history, space, sampler)
    trial = study.ask()
    drawn: dict[str, Value] = {}
    if "method" in space:
        drawn["method"] = _suggested(trial, "method", space["method"])
    method = drawn.get("method")
    for name, span in dimensions(space, None if method is None else str(method)).items():
        drawn[name] = _suggested(trial, name, span)
    return drawn


def _suggested(trial: Trial, name: str, span: Range) -> Value:
    if span.choices is not None:
        # None is no choice of a range.
        return cast(Value, trial.suggest_categorical(name, span.choices))
    return trial.suggest_float(name, *bounds(span), log=span.log)


def study_of(history: Sequence[TrialRecord], space: Space, sampler: BaseSampler | None = None) -> Study:
    """A study of Optuna's in memory that holds these trials; those that failed tell nothing and are left out."""
    import optuna

    # Optuna would tell of every trial that is added.
    logging.getLogger("optuna").setLevel(logging.WARNING)
    study = optuna.create_study(sampler=sampler)
    study.add_trials([frozen(record, space) for record in history if record.state != "failed"])
    return study


def frozen(record: TrialRecord, space: Space) -> FrozenTrial:
    """A trial in Optuna's form."""
    from optuna.trial import TrialState, create_trial

    states = {
        "running": TrialState.RUNNING,
        "completed": TrialState.COMPLETE,
        "pruned": TrialState.PRUNED,
        "failed": TrialState.FAIL,
    }
    return create_trial(
        state=states[record.state],
        value=record.value if record.state == "completed" else None,
        params=dict(record.params),
        distributions={name: distribution(space[name]) for name in record.params},
        intermediate_values=dict(record.intermediate),
    )


def _neighbour(params: Mapping[str, Value], space: Space, generator: np.random.Generator) -> dict[str, Value]:
    """A configuration that differs in one value: trained again, the very same would teach nothing."""
    movable = [name for name in params if name != "method" and _width(space[name])]
    if not movable:
        return dict(params)
    name = movable[int(generator.integers(len(movable)))]
    return {**params, name: _moved(params[name], space[name], generator)}


def _width(span: Range) -> bool:
    return len(span.choices) > 1 if span.choices is not None else span.low != span.high


def _moved(value: Value, span: Range, generator: np.random.Generator) -> Value:
    if span.choices is not None:
        others = [choice for choice in span.choices if choice != value]
        return others[int(generator.integers(len(others)))]
    first, last = bounds(span)
    low, high, at = first, last, float(value)
    if span.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    moved = at + generator.normal() * _NEIGHBOURHOOD * (high - low)
    # Beyond an end it comes back as far as it went.
    moved = min(max(2 * low - moved if moved < low else 2 * high - moved if moved > high else moved, low), high)
    back = math.exp(moved) if span.log else moved
    return min(max(back, first), last)
