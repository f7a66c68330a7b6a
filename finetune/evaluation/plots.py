"""Pictures of an evaluation, as PNG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BASE_COLOUR = "#9aa5b1"
_ADAPTER_COLOUR = "#0b7a75"
_WORSE_COLOUR = "#c2410c"


def loss_histogram_png(base: NDArray[np.float64], adapter: NDArray[np.float64]) -> bytes:
    """How the records' mean losses are distributed before and after; arrays of shape (records,), in nats per token."""
    figure, axes = _figure()
    edges = np.histogram_bin_edges(np.concatenate([base, adapter]), bins=min(40, 8 + len(base) // 4)).tolist()
    axes.hist(base, bins=edges, color=_BASE_COLOUR, alpha=0.85, label="base")
    axes.hist(adapter, bins=edges, color=_ADAPTER_COLOUR, alpha=0.75, label="adapter")
    axes.set_xlabel("loss, nats per token")
    axes.set_ylabel("records")
    axes.legend(frameon=False)
    return _png(figure)


def change_by_record_png(base: NDArray[np.float64], adapter: NDArray[np.float64]) -> bytes:
    """Each record's mean loss, base across and adapter up: what lies under the diagonal got better."""
    figure, axes = _figure()
    better = adapter <= base
    for chosen, colour, label in ((better, _ADAPTER_COLOUR, "better"), (~better, _WORSE_COLOUR, "worse")):
        axes.scatter(
            base[chosen], adapter[chosen], s=16, alpha=0.7, color=colour, linewidths=0, label=f"{chosen.sum()} {label}"
        )
    top = float(max(base.max(), adapter.max())) * 1.05
    axes.plot([0, top], [0, top], color="#52606d", linewidth=1, linestyle="--")
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("base, nats per token")
    axes.set_ylabel("adapter, nats per token")
    axes.legend(frameon=False)
    return _png(figure)


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
