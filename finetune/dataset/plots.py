"""The profile's picture."""

from __future__ import annotations

import io

from finetune.dataset.models import DatasetProfile


def token_histogram_png(profile: DatasetProfile) -> bytes:
    """How long the records are, as a PNG of 960 x 480 pixels.

    Everything beyond the last regular bin stands in one bar at the right edge, named as such.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"Length of {profile.total_samples:,} records in tokens", loc="left", fontweight="bold")
    axes.set_xlabel("tokens a record, with the chat template")
    axes.set_ylabel("records")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e6ea")
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if not profile.histogram:
        axes.text(0.5, 0.5, "no tokenizer was given", ha="center", transform=axes.transAxes)
    else:
        width = profile.histogram[0][1] - profile.histogram[0][0]
        lows = [low for low, _, _ in profile.histogram]
        counts = [count for _, _, count in profile.histogram]
        axes.bar(lows, counts, width=width, align="edge", color="#4c78a8", edgecolor="white", linewidth=0.5)
        low, high, count = profile.histogram[-1]
        if high - low > width:
            axes.annotate(
                f"{count:,} from {low:,} to {high - 1:,}",
                (low + width / 2, count),
                xytext=(0, 6),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
        for (name, tokens), style in zip(
            ((name, profile.percentiles[name]) for name in ("p50", "p95")), ("-", "--"), strict=True
        ):
            axes.axvline(tokens, color="#e45756", linestyle=style, linewidth=1.2, label=f"{name}: {tokens:,} tokens")
        axes.set_xlim(left=0, right=lows[-1] + width)
        axes.legend(frameon=False)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()
