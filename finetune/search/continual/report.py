"""A continual-learning result as files: JSON, one HTML page that needs nothing beside it, a picture."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from finetune.canvas import BAD, GOOD, LINE, PLAIN, canvas, png
from finetune.errors import ArtifactError
from finetune.publishing import is_complete, publish_directory, read_manifest
from finetune.reproduction.models import ExperimentManifest
from finetune.search.continual.comparison import PARTS, ContinualResult
from finetune.search.page import render_page, write_report

KIND = "continual"
CAPTIONS = {
    "losses.png": "Losses on old and on new held-out records",
    "changes.png": "Changes in loss, with 95 % intervals paired by record",
}


def publish_report(directory: Path, result: ContinualResult, manifest: ExperimentManifest) -> None:
    """Publish ``report.json``, ``report.html``, pictures and manifest, in the place of an earlier report of the same.

    Raises:
        StorageFullError: the disk is full.
    """
    plots = {"losses.png": losses_png(result), "changes.png": changes_png(result)}
    page = render_page("continual/report.html.jinja", plots=plots, captions=CAPTIONS, result=result, parts=PARTS)
    with publish_directory(directory, kind=KIND) as staging:
        write_report(staging.path, plots=plots, page=page, result=result, manifest=manifest)
        staging.inputs = {"dataset": result.dataset_fingerprint, "base_model": result.base_fingerprint}
        staging.parameters = result.spec.model_dump(mode="json")
        staging.results = {"conclusion": result.conclusion}


def read_report(directory: Path) -> ContinualResult | None:
    """The result that is there already, if it is whole; else None."""
    if not is_complete(directory):
        return None
    try:
        read_manifest(directory, kind=KIND, verify="hashes")
        result = ContinualResult.model_validate_json((directory / "report.json").read_bytes())
    except (ArtifactError, ValidationError):
        return None
    return result.model_copy(update={"path": directory, "reused": True})


def losses_png(result: ContinualResult) -> bytes:
    """A bar for each model's loss on old and on new records."""
    figure, axes = canvas(width=6.4)
    for part, offset, colour in zip(PARTS, (-0.2, 0.2), (PLAIN, GOOD), strict=True):
        heights = [arm.loss[part] for arm in result.arms]
        places = [place + offset for place in range(len(heights))]
        bars = axes.bar(places, heights, width=0.38, color=colour, label=f"{part} data")
        axes.bar_label(bars, fmt="%.3f", fontsize=7)
    axes.set_xticks(range(len(result.arms)), [arm.name.replace(" without", "\nwithout") for arm in result.arms])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    return png(figure)


def changes_png(result: ContinualResult) -> bytes:
    """Each change with its interval: to the right of zero the loss rose."""
    figure, axes = canvas(width=6.4, height=1.2 + 0.34 * len(result.changes))
    for place, change in enumerate(result.changes):
        colour = PLAIN if not change.shown else BAD if change.change > 0 else GOOD
        axes.plot(change.ci95, [place, place], color=colour, linewidth=2)
        axes.scatter([change.change], [place], color=colour, s=30)
    axes.axvline(0.0, color=LINE, linewidth=0.8)
    names = [f"{change.arm} − {change.against}, {change.part}" for change in result.changes]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("change in loss, nats per token")
    return png(figure)
