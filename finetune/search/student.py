"""Student's t distribution, for the few figures that comparisons need; SciPy would be 100 MB for them."""

from __future__ import annotations

import math
from functools import cache

_PRECISION = 1e-15
_TINY = 1e-300
_MOST_TERMS = 10_000


def two_sided_p(t: float, degrees: float) -> float:
    """The probability of a value as far from 0 as `t`, to either side.

    ``I_x(df / 2, 1 / 2)`` with ``x = df / (df + t^2)``: Abramowitz and Stegun, 26.7.1 and 26.5.27.

    Args:
        t: any number.
        degrees: of freedom, above 0, whole or not.
    """
    return _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


@cache
def critical_value(degrees: float, *, level: float = 0.95) -> float:
    """The `t` between minus which and which a value lies with probability `level`."""
    low, high = 0.0, 1.0
    while two_sided_p(high, degrees) > 1 - level:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if two_sided_p(middle, degrees) > 1 - level else (low, middle)
    return high


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function, by the continued fraction DLMF 8.17.22."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        # The fraction converges fast on this side alone.
        return 1 - _incomplete_beta(1 - x, b, a)
    logarithm = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(logarithm) / a / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """``1 + d1 / (1 + d2 / (1 + ...))``, by Lentz's method as Thompson and Barnett (1986) changed it."""
    value = numerator = 1.0
    denominator = 0.0
    for term in range(1, _MOST_TERMS):
        m = term // 2
        if term % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1 / (1 + d * denominator or _TINY)
        numerator = 1 + d / numerator or _TINY
        value *= numerator * denominator
        if abs(numerator * denominator - 1) < _PRECISION:
            break
    return value
