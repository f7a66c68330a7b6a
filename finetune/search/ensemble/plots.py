"""Pictures of an ensemble, as PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.canvas import BAD, GOOD, PLAIN, canvas, png

if TYPE_CHECKING:
    from finetune.search.ensemble.result import EnsembleResult, Figures


def losses_png(result: EnsembleResult) -> bytes:
    """Each member's loss on the judging half and the combination's, with their intervals; the best member as a line."""
    rows: list[tuple[str, Figures, str]] = [
        (member.name, member.evaluated.figures, PLAIN) for member in result.members if member.evaluated
    ]
    best = next((figures for name, figures, _ in rows if name == result.best_member), None)
    if result.combination:
        colour = GOOD if result.status == "published" else BAD
        rows.append(("combination", result.combination.figures, colour))
    figure, axes = canvas(width=5.8, height=1.6 + 0.35 * len(rows))
    for place, (_, figures, colour) in enumerate(rows):
        low, high = figures.judging_ci95
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.scatter([figures.judging_loss], [place], color=colour, s=34)
    if best:
        axes.axvline(best.judging_loss, color=PLAIN, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("loss, nats per token")
    return png(figure)


def soup_png(result: EnsembleResult) -> bytes:
    """The soup's loss with each member that was tried, in the order in which they were; what stayed is the line."""
    figure, axes = canvas(width=5.8)
    tried = [(place, taste) for place, taste in enumerate(result.tastes) if taste.loss is not None]
    kept = [(place, taste.loss) for place, taste in tried if taste.kept]
    axes.step(*zip(*kept, strict=True), where="post", color=GOOD, linewidth=1)
    for stays, colour, label in ((True, GOOD, "kept"), (False, BAD, "left out")):
        points = [(place, taste.loss) for place, taste in tried if taste.kept == stays]
        if points:
            places, losses = zip(*points, strict=True)
            axes.scatter(places, losses, color=colour, s=34, label=label)
    names = [result.members[taste.member].name for taste in result.tastes]
    axes.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    return png(figure)
