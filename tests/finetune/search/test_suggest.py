from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest

from finetune.errors import ConfigurationError
from finetune.planning.models import Range
from finetune.search.ledger import Limits, best_trial, budget_of, reason_to_stop, trials_remaining
from finetune.search.models import Strategy, TrialRecord, Value
from finetune.search.pruning import rungs
from finetune.search.space import dimensions, joint_space, plain
from finetune.search.suggest import suggest

RATE = Range(low=1e-5, high=1e-2, log=True)
SPACE = joint_space(
    {
        "lora": {"method": Range(choices=["lora"]), "learning_rate": RATE, "lora_rank": Range(choices=[4, 8, 16, 32])},
        "prefix": {"learning_rate": Range(low=1e-3, high=1e-1, log=True), "virtual_tokens": Range(choices=[10, 20])},
    }
)
MORNING = datetime(2026, 6, 1, 6, tzinfo=UTC)


def trial(
    number: int, value: float | None = None, *, params: dict[str, Value] | None = None, **fields: object
) -> TrialRecord:
    return TrialRecord.model_validate(
        {
            "number": number,
            "params": params or {"learning_rate": 1e-3},
            "state": "running" if value is None else "completed",
            "value": value,
            "finished_at": None if value is None else MORNING + timedelta(minutes=number),
            **fields,
        }
    )


def loss(params: dict[str, Value]) -> float:
    """Lowest for lora at a rate of 1e-3."""
    values = plain(params)
    return abs(math.log10(float(values["learning_rate"])) + 3) + (values["method"] == "prefix")


def searched(strategy: Strategy, trials: int, seed: int, **options: str) -> list[TrialRecord]:
    history: list[TrialRecord] = []
    for number in range(trials):
        params = suggest(history, SPACE, strategy, 1.0, trials - number, seed=seed, **options)  # type: ignore[arg-type]
        assert params is not None
        history.append(trial(number, loss(params), params=params))
    return history


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_every_strategy_repeats_itself_with_its_seed_and_no_other(strategy: Strategy) -> None:
    tried = [record.params for record in searched(strategy, 8, seed=1)]
    assert tried == [record.params for record in searched(strategy, 8, seed=1)]
    assert tried != [record.params for record in searched(strategy, 8, seed=2)]


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_values_of_another_method_are_not_drawn(strategy: Strategy) -> None:
    tried = [record.params for seed in range(4) for record in searched(strategy, 6, seed)]
    names = {"lora": {"method", "lora.learning_rate", "lora.lora_rank"}}
    names["prefix"] = {"method", "prefix.learning_rate", "prefix.virtual_tokens"}
    assert {str(params["method"]) for params in tried} == {"lora", "prefix"}
    for params in tried:
        assert set(params) == names[str(params["method"])]
        for name, value in params.items():
            span = SPACE[name]
            assert value in span.choices if span.choices else span.low <= value <= span.high  # type: ignore[operator]


def test_a_prefix_has_no_rank_even_where_the_space_names_one_for_all() -> None:
    space = {"method": Range(choices=["prefix", "lora"]), "lora_rank": Range(choices=[4]), "learning_rate": RATE}
    assert set(dimensions(space, "prefix")) == {"learning_rate"}
    assert set(dimensions(space, "lora")) == {"learning_rate", "lora_rank"}


def test_bayesian_is_random_for_three_trials_and_learns_then() -> None:
    for seed in (1, 2):
        bayesian, drawn = searched("bayesian", 4, seed), searched("random", 4, seed)
        assert [record.params for record in bayesian[:3]] == [record.params for record in drawn[:3]]
        assert bayesian[3].params != drawn[3].params
    # Once it has learned, it tries better configurations than chance does.
    late, chance = (
        sum(record.value or 0.0 for seed in range(4) for record in searched(strategy, 24, seed)[12:])
        for strategy in ("bayesian", "random")
    )
    assert late < 0.8 * chance


def test_a_gaussian_process_can_be_asked_instead() -> None:
    history = searched("random", 4, seed=0)
    choices = [suggest(history, SPACE, "bayesian", 1.0, 1, seed=0, sampler=kind) for kind in ("tpe", "gp")]
    assert None not in choices
    assert choices[0] != choices[1]


def test_a_bandit_changes_one_value_of_the_best_four_times_in_five() -> None:
    best: dict[str, Value] = {"method": "lora", "lora.learning_rate": 1e-3, "lora.lora_rank": 8}
    history = [trial(0, 0.5, params=best)]
    suggestions = [suggest(history, SPACE, "bandit", 1.0, 1, seed=seed) or {} for seed in range(200)]
    near = [s for s in suggestions if s.keys() == best.keys() and sum(s[name] != best[name] for name in best) == 1]
    assert 0.7 < len(near) / len(suggestions) < 0.9
    assert best not in suggestions


def test_nothing_is_suggested_when_budget_or_trials_are_spent() -> None:
    assert suggest([], SPACE, "random", 0.0, 5) is None
    assert suggest([], SPACE, "random", 1.0, 0) is None


@pytest.mark.parametrize(
    ("span", "fault"),
    [
        (Range(choices=[]), "no choices"),
        (Range(low=1.0), "neither choices nor both ends"),
        (Range(low=2.0, high=1.0), "no interval"),
        (Range(low=0.0, high=1.0, log=True), "above 0"),
    ],
)
def test_a_range_that_cannot_be_drawn_from_is_named(span: Range, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=f"learning_rate.*{fault}"):
        suggest([], {"learning_rate": span}, "random", 1.0, 1)


def test_running_trials_reserve_and_others_cost_what_they_used() -> None:
    history = [
        trial(0, 0.5, gpu_hours=1.0, reserved_gpu_hours=3.0),
        trial(1, gpu_hours=0.5, reserved_gpu_hours=2.0),
        trial(2, state="pruned", gpu_hours=0.25, reserved_gpu_hours=2.0),
    ]
    budget = budget_of(history, 5.0)
    assert (budget.used, budget.reserved, budget.remaining) == (1.75, 1.5, 1.75)


def test_each_limit_ends_the_experiment_and_says_so() -> None:
    falling = [trial(number, 1.0 - number / 10) for number in range(4)]
    stuck = [*falling, *(trial(number, 0.9) for number in (4, 5, 6))]
    unlimited = Limits(max_trials=100, budget_gpu_hours=1.0, stop_patience=3, max_loop_iterations=100)
    assert reason_to_stop(falling, unlimited) is None
    assert reason_to_stop(stuck[:-1], unlimited) is None
    assert reason_to_stop(stuck, unlimited) == "patience"
    assert reason_to_stop(stuck, unlimited.model_copy(update={"stop_patience": None})) is None
    assert reason_to_stop(falling, unlimited.model_copy(update={"stop_threshold": 0.7})) == "threshold"
    assert reason_to_stop(falling, unlimited.model_copy(update={"max_trials": 4})) == "max_trials"
    spent = [trial(0, 0.5, gpu_hours=1.01)]
    assert reason_to_stop(spent, unlimited) == "budget"
    again = [trial(0, 0.5, attempts=3), trial(1, state="failed")]
    assert reason_to_stop(again, unlimited.model_copy(update={"max_loop_iterations": 4})) == "max_loop_iterations"


def test_failed_trials_leave_room_for_others_and_pruned_ones_try_no_patience() -> None:
    history = [trial(0, 0.5), *(trial(n, state="pruned") for n in (1, 2, 3, 4)), trial(5, state="failed")]
    limits = Limits(max_trials=6, stop_patience=3)
    assert reason_to_stop(history, limits) is None
    assert trials_remaining(history, limits) == 1
    assert best_trial(history) == history[0]


def test_rungs_are_fractions_of_a_training_of_any_length() -> None:
    assert rungs(90) == {10: 1, 30: 3}
    assert rungs(3) == {1: 3}
    assert rungs(1) == {}
