"""Pictures of an evaluation, as PNG."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetune.canvas import BAD, GOOD, LINE, PLAIN, canvas, png


def loss_histogram_png(base: NDArray[np.float64], adapter: NDArray[np.float64]) -> bytes:
    """How the records' mean losses are distributed before and after; arrays of shape (records,), in nats per token."""
    figure, axes = canvas()
    edges = np.histogram_bin_edges(np.concatenate([base, adapter]), bins=min(40, 8 + len(base) // 4)).tolist()
    axes.hist(base, bins=edges, color=PLAIN, alpha=0.85, label="base")
    axes.hist(adapter, bins=edges, color=GOOD, alpha=0.75, label="adapter")
    axes.set_xlabel("loss, nats per token")
    axes.set_ylabel("records")
    axes.legend(frameon=False)
    return png(figure)


def change_by_record_png(base: NDArray[np.float64], adapter: NDArray[np.float64]) -> bytes:
    """Each record's mean loss, base across and adapter up: what lies under the diagonal got better."""
    figure, axes = canvas()
    better = adapter <= base
    for chosen, colour, label in ((better, GOOD, "better"), (~better, BAD, "worse")):
        axes.scatter(
            base[chosen], adapter[chosen], s=16, alpha=0.7, color=colour, linewidths=0, label=f"{chosen.sum()} {label}"
        )
    top = float(max(base.max(), adapter.max())) * 1.05
    axes.plot([0, top], [0, top], color=LINE, linewidth=1, linestyle="--")
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("base, nats per token")
    axes.set_ylabel("adapter, nats per token")
    axes.legend(frameon=False)
    return png(figure)
