"""What pictures have in common."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is meant, what it is compared with, and what is bad about it.
GOOD, PLAIN, BAD, LINE = "#0b7a75", "#9aa5b1", "#c2410c", "#52606d"


def canvas(width: float = 5.2, height: float = 3.6) -> tuple[Figure, Axes]:
    """One empty diagram; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The diagram as a file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
