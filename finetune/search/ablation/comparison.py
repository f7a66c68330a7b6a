"""Configurations that were trained with the same seeds and measured on the same records, compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

# Below this share of a mean, what varies is the last digits of numbers that are equal.
_ROUNDING = 1e-12


class Difference(BaseModel):
    """How much higher one configuration's loss is than another's, in nats per token; negative: it is better.

    `p_value` is that of no difference at all; where nothing varies, there is none, and no interval.
    """

    model_config = ConfigDict(frozen=True)

    mean: float
    ci95: tuple[float, float] | None
    degrees: int | None
    p_value: float | None


def mean_ci95(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of a mean over seeds by Student's t; None for fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count)
    half = _critical_value(count - 1) * error
    return mean - half, mean + half


def paired_difference(ours: NDArray[np.float64], theirs: NDArray[np.float64], tokens: NDArray[np.int64]) -> Difference:
    """The difference of two configurations, tested against chance in both seeds and records.

    What is found shall hold for other seeds and for other records of the kind, so both count as drawn: the pairs are
    the cells of seeds crossed with records, and their two-way analysis of variance gives the variance of the mean
    (Dorfman, Berbaum and Metz, Investigative Radiology 27, 1992, where readers and cases are what seeds and records
    are here; Clark, Journal of Verbal Learning and Verbal Behavior 12, 1973). A loss per token is a ratio, whose
    records stand in with their linearised values (Cochran, Sampling Techniques, 1977, chapter 6). The degrees of
    freedom are the fewer of the two, with which no mixture of both variances is right less often than it says (Mickey
    and Brown, Annals of Mathematical Statistics 37, 1966); Satterthwaite's were wrong in 12 % of cases with two seeds.
    With one record it is the paired t-test over seeds.

    Args:
        ours: summed losses in nats, shape (seeds, records), two seeds or more.
        theirs: of the configuration to compare with, with the same seeds on the same records.
        tokens: of each record, shape (records,).
    """
    differences = ours - theirs
    seeds, records = differences.shape
    by_seed = differences.sum(axis=1, keepdims=True) / tokens.sum()
    mean = float(by_seed.mean())
    # Each row's mean is the seed's difference.
    cells = by_seed + (differences - by_seed * tokens) * (records / tokens.sum())
    by_record = cells.mean(axis=0, keepdims=True)
    of_seeds, of_records = seeds - 1, records - 1
    between_seeds = records * float(((by_seed - mean) ** 2).sum()) / of_seeds
    between_records = seeds * float(((by_record - mean) ** 2).sum()) / max(of_records, 1)
    rest = float(((cells - by_seed - by_record + mean) ** 2).sum()) / max(of_seeds * of_records, 1)

    error = math.sqrt((between_seeds + max(between_records - rest, 0.0)) / (seeds * records))
    if error <= _ROUNDING * abs(mean):
        equal = not differences.any()
        return Difference(mean=mean, ci95=(0.0, 0.0) if equal else None, degrees=None, p_value=1.0 if equal else None)
    degrees = min(of_seeds, of_records) if of_records else of_seeds
    half = _critical_value(degrees) * error
    return Difference(
        mean=mean, ci95=(mean - half, mean + half), degrees=degrees, p_value=_two_sided_p(mean / error, degrees)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value, corrected for all of them: those below 0.05 are right together with a probability of 95 %.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    corrected = [0.0] * len(p_values)
    least = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = least
    return corrected


def _critical_value(degrees: int) -> float:
    """Student's t between minus which and which a value lies with a probability of 95 %."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def _two_sided_p(t: float, degrees: int) -> float:
    """The probability of a value as far from 0 as `t`, to either side."""
    from scipy.special import stdtr

    return 2 * float(stdtr(degrees, -abs(t)))
