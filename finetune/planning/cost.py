"""Time and cost of a training before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finetune.errors import ConfigurationError
from finetune.planning.history import Measurement, measured_throughput
from finetune.planning.models import CostEstimate, Method, TrainingPlan


def estimate_cost(
    tokens: int | None,
    method: Method,
    *,
    history: Sequence[Measurement] = (),
    stated_tokens_per_second: float | None = None,
    price_per_gpu_hour: float | None = None,
) -> CostEstimate:
    """GPU-hours and price of training `tokens` tokens: tokens / throughput, one GPU.

    Args:
        tokens: all tokens that the training will see, or None if nobody counted.
        method: of the training.
        history: trainings of the same model on the same kind of device, newest first; they count more than
            what is stated.
        stated_tokens_per_second: throughput to expect where nothing was measured.
        price_per_gpu_hour: in any currency.
    """
    measured = measured_throughput(history, method)
    if measured is not None:
        speed, source = measured[0], f"measured, median of {measured[1]}"
    elif stated_tokens_per_second is not None:
        speed, source = stated_tokens_per_second, "stated"
    else:
        return CostEstimate(tokens_per_second=None, throughput="unknown", gpu_hours=None, price=None)
    hours = None if tokens is None else tokens / speed / 3600
    price = None if hours is None or price_per_gpu_hour is None else hours * price_per_gpu_hour
    return CostEstimate(tokens_per_second=speed, throughput=source, gpu_hours=hours, price=price)


def gpu_hours(plans: Iterable[TrainingPlan]) -> float | None:
    """What trainings take together, or None where the time of one is unknown."""
    hours = [None if plan.cost is None else plan.cost.gpu_hours for plan in plans]
    return None if None in hours else sum(each for each in hours if each is not None)


def refuse_all_above(plans: Sequence[TrainingPlan], max_gpu_hours: float | None) -> None:
    """Do not let trainings start that are estimated to take longer together than they may; see `refuse_above`.

    Raises:
        ConfigurationError: with the numbers.
    """
    hours = gpu_hours(plans)
    if max_gpu_hours is not None and hours is not None and hours > max_gpu_hours:
        raise ConfigurationError(
            f"{len(plans)} trainings need about {hours:.3g} GPU-hours together and may take {max_gpu_hours:g}",
            where="MAX_GPU_HOURS",
            remedy="Raise it, or train fewer of them, fewer epochs, fewer records or a smaller base model",
        )


def refuse_above(plan: TrainingPlan, max_gpu_hours: float | None) -> None:
    """Do not let a training start that is estimated to take longer than it may.

    A plan whose time is unknown may start: nothing was measured, and nothing stated.

    Raises:
        ConfigurationError: with the numbers.
    """
    hours = None if plan.cost is None else plan.cost.gpu_hours
    if max_gpu_hours is None or hours is None or hours <= max_gpu_hours or plan.cost is None:
        return
    raise ConfigurationError(
        f"the training needs about {hours:.3g} GPU-hours and may take {max_gpu_hours:g} ({plan.estimated_tokens} "
        f"tokens in {plan.estimated_steps} steps, at {plan.cost.tokens_per_second:.0f} tokens per second, "
        f"{plan.cost.throughput})",
        where="MAX_GPU_HOURS",
        remedy="Raise it, or train fewer epochs, fewer records or a smaller base model",
    )
