"""An experiment as files: its result as JSON, one HTML page that needs nothing beside it, pictures, the best trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.planning.models import Range
from finetune.publishing import publish_directory
from finetune.reproduction.models import ExperimentManifest
from finetune.search.ledger import best_trial, budget_of
from finetune.search.models import StepResult, StopReason, TrialRecord
from finetune.search.page import render_page, write_report
from finetune.search.plots import pictures
from finetune.search.result import shown
from finetune.search.spec import ExperimentSpec

KIND = "experiment"
CAPTIONS = {
    "history.png": "Each trial's result, and the best so far",
    "budget.png": "Budget over time",
    "parallel.png": "Configurations of the completed trials: the darker, the better",
    "importance.png": "How much each value decides (PED-ANOVA)",
}


def publish_report(
    directory: Path,
    *,
    name: str,
    spec: ExperimentSpec,
    space: Mapping[str, Range],
    history: Sequence[TrialRecord],
    ended: StopReason | None,
    result: StepResult,
    manifest: ExperimentManifest,
) -> None:
    """Publish ``result.json``, ``report.html``, the pictures and the manifest, in the place of an earlier report.

    Args:
        directory: where.
        name: the experiment's.
        spec: as it was run last.
        space: what was searched.
        history: all trials.
        ended: why it is over, if it is.
        result: what is handed back.
        manifest: what it was made from.

    Raises:
        StorageFullError: the disk is full.
    """
    plots = pictures(history, space, budget_gpu_hours=spec.budget_gpu_hours, metric=spec.stop_metric)
    page = render_page(
        "report.html.jinja",
        plots=plots,
        captions=CAPTIONS,
        name=name,
        spec=spec,
        space=space,
        history=history,
        best=best_trial(history),
        budget=budget_of(history, spec.budget_gpu_hours),
        ended=ended,
        adopted=result.metadata["adopt_trial"],
        shown=shown,
    )
    with publish_directory(directory, kind=KIND) as staging:
        write_report(staging.path, plots=plots, page=page, result=result, manifest=manifest, result_name="result.json")
        staging.parameters = spec.model_dump(mode="json")
        staging.results = result.metadata
