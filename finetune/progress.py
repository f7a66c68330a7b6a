"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ProgressEvent:
    """One report: `done` of `total` `unit`s of `stage`, with figures such as ``loss``."""

    stage: str
    done: int
    total: int | None
    unit: str
    figures: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.total is None and self.done == 0:
            return f"{self.stage} ..."
        amount = f"{self.done}/{self.total}" if self.total is not None else f"{self.done}"
        figures = "".join(f" {name} {value:.4g}" for name, value in self.figures.items())
        return f"{self.stage}: {amount} {self.unit}{figures}"


Progress = Callable[[ProgressEvent], None]


def ignore_progress(event: ProgressEvent) -> None:
    """A listener for callers that want none."""
