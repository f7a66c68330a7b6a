"""Pictures of an experiment, as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.canvas import BAD, GOOD, LINE, PLAIN, canvas, png
from finetune.search.ledger import best_trial
from finetune.search.models import TrialRecord
from finetune.search.space import Space, plain
from finetune.search.suggest import study_of

_TRIAL, _BEST, _PRUNED = PLAIN, GOOD, BAD
# Of a parallel axis: the columns that are no parameter.
_VALUE = "result"


def pictures(history: Sequence[TrialRecord], space: Space, *, budget_gpu_hours: float, metric: str) -> dict[str, bytes]:
    """All pictures that these trials give, by file name; an importance needs four completed trials."""
    found = {
        "history.png": optimization_history_png(history, metric=metric),
        "budget.png": budget_png(history, budget_gpu_hours),
    }
    if completed := [trial for trial in history if trial.value is not None]:
        found["parallel.png"] = parallel_coordinates_png(completed, metric=metric)
    if importances := parameter_importances(history, space):
        found["importance.png"] = importance_png(importances)
    return found


def optimization_history_png(history: Sequence[TrialRecord], *, metric: str) -> bytes:
    """Each trial's value, the best so far as a line; pruned trials stand at their last measurement."""
    figure, axes = canvas()
    completed = [(trial.number, trial.value) for trial in history if trial.value is not None]
    pruned = [
        (t.number, t.intermediate[max(t.intermediate)]) for t in history if t.state == "pruned" and t.intermediate
    ]
    for points, colour, label in ((completed, _TRIAL, "completed"), (pruned, _PRUNED, "pruned, when it was")):
        if points:
            numbers, values = zip(*points, strict=True)
            axes.scatter(numbers, values, s=22, color=colour, label=label)
    if completed:
        numbers, values = zip(*completed, strict=True)
        axes.step(numbers, np.minimum.accumulate(values).tolist(), where="post", color=_BEST, label="best so far")
        axes.legend(frameon=False)
    axes.set_xlabel("trial")
    axes.set_ylabel(metric)
    return png(figure)


def budget_png(history: Sequence[TrialRecord], gpu_hours: float) -> bytes:
    """Hours used by the time each trial ended, against the budget."""
    figure, axes = canvas()
    ended = sorted((t.finished_at, t.started_at or t.finished_at, t.gpu_hours) for t in history if t.finished_at)
    if ended:
        first = min(started for _, started, _ in ended)
        hours = [0.0, *((finished - first).total_seconds() / 3600 for finished, _, _ in ended)]
        used = np.cumsum([0.0, *(taken for _, _, taken in ended)]).tolist()
        axes.step(hours, used, where="post", color=_BEST, label="used")
    axes.axhline(gpu_hours, color=_PRUNED, linestyle="--", linewidth=1, label="budget")
    axes.set_xlabel("hours since the first trial began")
    axes.set_ylabel("GPU-hours")
    axes.legend(frameon=False)
    return png(figure)


def parallel_coordinates_png(completed: Sequence[TrialRecord], *, metric: str) -> bytes:
    """A line a trial through its values, each axis from its lowest to its highest; dark lines are good ones."""
    rows = [{**plain(trial.params), _VALUE: trial.value or 0.0} for trial in completed]
    names = [*dict.fromkeys(name for row in rows for name in row if name != _VALUE), _VALUE]
    figure, axes = canvas(width=max(5.2, 1.3 * len(names)))
    positions = {name: _positions([row.get(name) for row in rows]) for name in names}
    ranks = np.argsort(np.argsort([trial.value or 0.0 for trial in completed])) / max(1, len(rows) - 1)
    for index in np.argsort(-ranks).tolist():
        points = [(x, positions[name][0][index]) for x, name in enumerate(names)]
        kept = [(x, y) for x, y in points if y is not None]
        axes.plot(*zip(*kept, strict=True), color=_BEST, alpha=0.15 + 0.85 * (1 - ranks[index]), linewidth=1.4)
    for x, name in enumerate(names):
        axes.axvline(x, color=LINE, linewidth=0.6)
        low, high = positions[name][1]
        style: dict[str, Any] = {"ha": "center", "fontsize": 8, "textcoords": "offset points"}
        axes.annotate(low, (x, 0.0), va="top", xytext=(0, -4), **style)
        axes.annotate(high, (x, 1.0), va="bottom", xytext=(0, 4), **style)
    axes.set_xticks(range(len(names)), [metric if name == _VALUE else name for name in names], rotation=20, fontsize=8)
    axes.tick_params(axis="x", pad=12)
    axes.set_yticks([])
    axes.set_ylim(-0.02, 1.02)
    axes.spines[["left", "bottom"]].set_visible(False)
    return png(figure)


def parameter_importances(history: Sequence[TrialRecord], space: Space) -> dict[str, float]:
    """How much each value decides among the best method's trials, together 1; empty below four completed trials.

    PED-ANOVA (Watanabe et al. 2023), as Optuna has it.
    """
    best = best_trial(history)
    if best is None:
        return {}
    method = best.params.get("method")
    completed = [t for t in history if t.value is not None and t.params.get("method") == method]
    if len(completed) < 4 or len({trial.value for trial in completed}) < 2:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    names = [name for name in best.params if name != "method"]
    found = get_param_importances(study_of(completed, space), evaluator=PedAnovaImportanceEvaluator(), params=names)
    return {name.rpartition(".")[2]: share for name, share in found.items() if math.isfinite(share)}


def importance_png(importances: Mapping[str, float]) -> bytes:
    """A bar for each value's share."""
    figure, axes = canvas()
    names = sorted(importances, key=importances.__getitem__)
    axes.barh(names, [importances[name] for name in names], color=_BEST)
    axes.set_xlabel("importance")
    return png(figure)


def _positions(values: Sequence[Any]) -> tuple[list[float | None], tuple[str, str]]:
    """Places from 0 to 1 on an axis, None where a trial has no such value, and what stands at its ends."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        low, high = min(known), max(known)
        log = low > 0 and high / low >= 10
        scale = math.log if log else float
        width = scale(high) - scale(low) or 1.0
        places = [None if value is None else (scale(value) - scale(low)) / width for value in values]
        return places, (f"{low:.3g}", f"{high:.3g}")
    names = sorted(map(str, set(known)))
    step = max(1, len(names) - 1)
    return [None if value is None else names.index(str(value)) / step for value in values], (names[0], names[-1])
