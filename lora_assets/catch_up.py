"""Which dates a catch-up makes: one decision for the nightly schedule and for `lora-assets run`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from finetune.dataset.discovery import ExportFile, window_stats
from finetune.dataset.models import PreparedDataset
from finetune.planning.cost import estimate_cost
from finetune.planning.history import Measurement
from finetune.planning.models import TrainingPlan
from finetune.training.models import TrainingResult
from lora_assets.freshness import DateState, choose_dates, read_value
from lora_assets.settings import Settings

# Trainings that an estimate looks back on.
_HISTORY = 10


@dataclass(frozen=True)
class CatchUp:
    """The dates to make, the newest first, and why others that need it are left for another time."""

    dates: list[str]
    left: dict[str, str] = field(default_factory=dict)


def catch_up(
    settings: Settings,
    files: Sequence[ExportFile],
    states: Sequence[DateState],
    *,
    every: bool = False,
    latest: bool = False,
    busy: Collection[str] = (),
    given_up: Mapping[str, str] = MappingProxyType({}),
) -> CatchUp:
    """What is made now: dates without a good adapter, and of those whose inputs changed the newest.

    Args:
        settings: in force; with RETRAIN=all every date whose inputs changed is made.
        files: all exports, as `discover_exports` returns them.
        states: of all dates, oldest first.
        every: as RETRAIN=all.
        latest: only the newest date, and only if it needs it.
        busy: dates that are being made or wait to be.
        given_up: why dates are not tried again, by date.
    """
    wanted = choose_dates(states, every=every or settings.retrain == "all", latest=latest)
    due = [date for date in wanted if date not in given_up]
    hours = estimated_hours(settings, files, due) if settings.catch_up_gpu_hours else {}
    chosen = choose(due, hours, budget=settings.catch_up_gpu_hours, busy=busy)
    return CatchUp(chosen.dates, chosen.left | {date: given_up[date] for date in wanted if date in given_up})


def choose(
    due: Collection[str],
    hours: Mapping[str, float | None],
    *,
    budget: float | None = None,
    busy: Collection[str] = (),
) -> CatchUp:
    """Take dates, the newest first, as long as their GPU-hours fit the budget.

    A date that does not fit is passed over for older and smaller ones. Of dates whose time nobody can tell,
    one is taken: it is measured, and the next catch-up knows.

    Args:
        due: the dates that need to be made, in any order.
        hours: what each is estimated to take in GPU-hours, None if unknown.
        budget: GPU-hours in all, None for no limit.
        busy: dates that are being made or wait to be.
    """
    dates: list[str] = []
    left: dict[str, str] = {}
    spent, unknown = 0.0, 0
    for date in sorted(due, reverse=True):
        takes = hours.get(date)
        if date in busy:
            left[date] = "a run of it is under way"
        elif budget is None:
            dates.append(date)
        elif takes is None:
            if unknown:
                left[date] = "nobody can tell how long it takes until one was measured"
            else:
                dates.append(date)
            unknown += 1
        elif spent + takes <= budget:
            dates.append(date)
            spent += takes
        else:
            left[date] = f"it needs about {takes:.3g} GPU-hours, and {budget - spent:.3g} of {budget:g} are left"
    return CatchUp(dates, left)


def estimated_hours(settings: Settings, files: Sequence[ExportFile], dates: Collection[str]) -> dict[str, float | None]:
    """GPU-hours that the training of each date will take, from earlier plans and trainings; nothing is started.

    A date whose plan is of its present exports takes what that plan's tokens take at the speed of the newest
    trainings; any other as many tokens a byte of exports as the newest plan.

    Args:
        settings: in force.
        files: all exports, as `discover_exports` returns them.
        dates: those to estimate.
    """
    newest = sorted({file.date for file in files}, reverse=True)
    plans = {date: plan for date in newest if (plan := read_value(settings, "training_plan", date, TrainingPlan))}
    history = [
        Measurement(method=plan.trial_config.method, device=result.device, tokens_per_second=result.tokens_per_second)
        for date, plan in list(plans.items())[:_HISTORY]
        if (result := read_value(settings, "adapter", date, TrainingResult)) and result.device
    ]
    windows = window_stats(files, settings.dataset_window)
    counted = next(((date, plan) for date, plan in plans.items() if plan.estimated_tokens), None)

    def tokens(date: str) -> float | None:
        prepared = read_value(settings, "merged_dataset", date, PreparedDataset)
        own = plans.get(date)
        if own and own.estimated_tokens and prepared and prepared.stat_fingerprint == windows[date].fingerprint:
            return own.estimated_tokens
        if counted is None:
            return None
        known, plan = counted
        return (plan.estimated_tokens or 0) * windows[date].size / max(1, windows[known].size)

    def hours(date: str) -> float | None:
        plan = plans.get(date) or (counted[1] if counted else None)
        found = tokens(date)
        if plan is None or found is None:
            return None
        return estimate_cost(
            round(found),
            plan.trial_config.method,
            history=history,
            stated_tokens_per_second=settings.tokens_per_second,
        ).gpu_hours

    return {date: hours(date) for date in dates}
