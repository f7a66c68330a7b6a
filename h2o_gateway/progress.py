"""How far a training is, from H2O LLM Studio's ``charts_cache``.

That is an SQLite database of the diskcache package: table ``Cache`` (key, mode, filename, value), values
as pickles (mode 4), large ones in a file beside it. Only plain values are unpickled.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.planning.models import TrialConfig

_PICKLE = 4


@dataclass(frozen=True)
class Point:
    """One optimizer step: the mean loss of its batches, and the learning rate after it."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class Progress:
    """Optimizer steps done and planned, and the loss of each."""

    step: int = 0
    total_steps: int | None = None
    points: list[Point] = field(default_factory=list)


def read_progress(output: Path, trial: TrialConfig) -> Progress:
    """What H2O LLM Studio has written so far; nothing where it has not begun to."""
    charts = output / "charts_cache"
    internal, train, meta = (_group(charts, key) for key in ("internal", "train", "meta"))
    done, total = _last(internal, "current_step"), _last(internal, "total_training_steps")
    losses, rates = _values(train, "loss"), _values(meta, "lr")
    size = trial.accumulation
    points = []
    for step, start in enumerate(range(0, len(losses), size), start=1):
        chunk = [loss for loss in losses[start : start + size] if loss is not None]
        rate = rates[min(start + size, len(rates)) - 1] if rates else None
        if chunk and rate is not None:
            points.append(Point(step, sum(chunk) / len(chunk), rate))
    # H2O counts records.
    return Progress(
        step=math.ceil((done or 0) / trial.effective_batch),
        total_steps=None if total is None else math.ceil(total / trial.effective_batch),
        points=points,
    )


def training_log(points: list[Point]) -> bytes:
    """The points as JSON lines of step, loss and learning_rate."""
    lines = [{"step": point.step, "loss": point.loss, "learning_rate": point.learning_rate} for point in points]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _last(group: dict[str, Any], name: str) -> float | None:
    values = _values(group, name)
    return values[-1] if values else None


def _values(group: dict[str, Any], name: str) -> list[float | None]:
    series = group.get(name)
    values = series.get("values") if isinstance(series, dict) else None
    if not isinstance(values, list):
        return []
    return [value if isinstance(value, int | float) and math.isfinite(value) else None for value in values]


def _group(charts: Path, key: str) -> dict[str, Any]:
    database = charts / "cache.db"
    if not database.is_file():
        return {}
    # A database that is being made or a file that has just been replaced is news for the next look.
    with contextlib.suppress(sqlite3.Error, OSError, pickle.UnpicklingError, EOFError):
        connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=1)
        try:
            row = connection.execute("SELECT mode, filename, value FROM Cache WHERE key = ?", (key,)).fetchone()
        finally:
            connection.close()
        if row and row[0] == _PICKLE:
            content = (charts / row[1]).read_bytes() if row[1] else row[2]
            group = _PlainUnpickler(io.BytesIO(content)).load()
            return group if isinstance(group, dict) else {}
    return {}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")
