"""The search space: ranges by name, some of which count for one method alone.

A name such as ``prefix.learning_rate`` counts where the method is ``prefix``, a plain one for every method
that has such a value: a prefix has no rank, whatever the space says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.errors import ConfigurationError
from finetune.planning.models import Range
from finetune.search.models import Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Space = Mapping[str, Range]

_LORA = frozenset({"lora", "qlora"})
_ONLY = dict.fromkeys(
    ("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "use_pissa", "target_modules"), _LORA
) | {"virtual_tokens": frozenset({"prefix"})}


def joint_space(spaces: Mapping[str, Space]) -> dict[str, Range]:
    """One space of several methods: the method is a dimension, and the others count for theirs alone.

    A single method's space is left as it is.
    """
    if len(spaces) == 1:
        return dict(next(iter(spaces.values())))
    joint = {"method": Range(choices=list(spaces))}
    for method, space in spaces.items():
        joint |= {f"{method}.{name}": span for name, span in space.items() if name != "method"}
    return joint


def dimensions(space: Space, method: str | None) -> dict[str, Range]:
    """The ranges other than the method's that count for a method; all plain ones where there is none."""
    return {name: span for name, span in space.items() if name != "method" and counts_for(name, method)}


def counts_for(name: str, method: str | None) -> bool:
    """Whether a value decides anything in trainings by a method; None is any method."""
    owner, _, plain = name.rpartition(".")
    if owner:
        return owner == method
    return method is None or method in _ONLY.get(plain, {method})


def plain(params: Mapping[str, Value]) -> dict[str, Value]:
    """A configuration by the plain names of its values."""
    return {name.rpartition(".")[2]: value for name, value in params.items()}


def distribution(span: Range) -> BaseDistribution:
    """Optuna's form of a range."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if span.choices is not None:
        return CategoricalDistribution(span.choices)
    return FloatDistribution(*bounds(span), log=span.log)


def bounds(span: Range) -> tuple[float, float]:
    """Both ends of an interval.

    Raises:
        ConfigurationError: it lacks one.
    """
    if span.low is None or span.high is None:
        raise ConfigurationError(
            "a range has neither choices nor both ends", where="search_space", remedy="Give it choices, or low and high"
        )
    return span.low, span.high


def refuse_bad_space(space: Space) -> None:
    """See that every range can be drawn from.

    Raises:
        ConfigurationError: names the range and what is wrong with it.
    """
    if not space:
        raise ConfigurationError("there is nothing to search", where="search_space", remedy="Name a range")
    for name, span in space.items():
        if span.choices is not None:
            fault = "" if span.choices else "it has no choices"
        elif span.low is None or span.high is None:
            fault = "it has neither choices nor both ends"
        elif not (math.isfinite(span.low) and math.isfinite(span.high) and span.low <= span.high):
            fault = f"{span.low:g} to {span.high:g} is no interval"
        else:
            fault = "a logarithmic range begins above 0" if span.log and span.low <= 0 else ""
        if fault:
            raise ConfigurationError(
                f"the range of {name} cannot be searched: {fault}",
                where="search_space",
                remedy="Give it choices, or low and high",
            )
