"""Pictures of a training."""

from __future__ import annotations

import io
from collections.abc import Sequence

from finetune.training.models import LossPoint


def loss_curve_png(points: Sequence[LossPoint]) -> bytes:
    """The loss over the optimizer steps as a PNG: every step thin, their running mean thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    steps = [point.step for point in points]
    axes.plot(steps, [point.loss for point in points], color="tab:blue", alpha=0.35, linewidth=1, label="loss")
    axes.plot(steps, _running_mean([point.loss for point in points]), color="tab:blue", linewidth=2, label="mean")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(steps, [point.learning_rate for point in points], color="tab:orange", linewidth=1, label="learning rate")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _running_mean(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean without the bias towards zero at its beginning (Kingma & Ba 2014, section 3)."""
    mean, correction, result = 0.0, 1.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        correction *= weight
        result.append(mean / (1 - correction))
    return result
