"""Pictures of an ablation, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.canvas import BAD, GOOD, LINE, PLAIN, canvas, png
from finetune.search.ablation.spec import Setting, shown_value

if TYPE_CHECKING:
    from finetune.search.ablation.report import AblationResult, ArmFigures

_COLOURS = {"base": LINE, "better": GOOD, "worse": BAD, "same": PLAIN, "open": PLAIN, "failed": PLAIN}


def pictures(result: AblationResult) -> dict[str, bytes]:
    """A picture for each parameter, or one of all configurations of a grid, by file name."""
    if result.spec.grid:
        return {"configurations.png": arms_png([(arm.label, arm) for arm in result.arms], "")}
    return {f"{name}.png": arms_png(_along(result, name), name) for name in result.spec.parameters}


def _along(result: AblationResult, name: str) -> list[tuple[str, ArmFigures]]:
    """The configurations that differ in one parameter, the base among them, in its order."""
    base: Setting = getattr(result.base.trial_config, name)
    values = [(base, result.base), *((arm.changed[name], arm) for arm in result.arms if name in arm.changed)]
    numbers = [value for value, _ in values if isinstance(value, int | float)]
    if len(numbers) == len(values):
        values = [values[index] for index in sorted(range(len(values)), key=numbers.__getitem__)]
    return [(shown_value(value), arm) for value, arm in values]


def arms_png(named: Sequence[tuple[str, ArmFigures]], parameter: str) -> bytes:
    """Each configuration's mean and interval, and its seeds as points; the line is the base configuration's mean.

    Args:
        named: configurations with what stands below them, the base among them.
        parameter: what they differ in.
    """
    figure, axes = canvas(width=max(5.2, 0.8 * len(named)))
    for place, (_, arm) in enumerate(named):
        colour = _COLOURS[arm.verdict]
        losses = [run.loss for run in arm.runs if run.loss is not None]
        axes.scatter([place] * len(losses), losses, s=14, color=colour, alpha=0.6, linewidths=0)
        if arm.mean is None:
            axes.annotate(
                "failed", (place, 0.5), xycoords=("data", "axes fraction"), ha="center", fontsize=8, color=BAD
            )
            continue
        if arm.ci95 is not None:
            axes.vlines(place, *arm.ci95, color=colour, linewidth=1.6)
        axes.plot([place], [arm.mean], marker="_", markersize=16, color=colour, linewidth=0)
        if arm.verdict == "base":
            axes.axhline(arm.mean, color=LINE, linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(named)), [label for label, _ in named], rotation=20 if len(named) > 4 else 0, fontsize=8)
    axes.set_xlim(-0.5, len(named) - 0.5)
    axes.set_xlabel(parameter)
    axes.set_ylabel("held-out loss, nats per token")
    return png(figure)
