"""Dates that fail for good: what failed so several times is not asked for again while nothing changes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg

from finetune.dataset.discovery import ExportFile, window_stats
from finetune.publishing import sha256_json
from lora_assets.logs import PARTITION
from lora_assets.outcome import failed_steps
from lora_assets.settings import Settings

# What a run is asked to work on: the exports of its window, and every setting.
INPUTS = "lora-assets/inputs"
# A person may have mended what no setting tells of, such as a model that was missing.
ATTEMPTS = 3
# The newest failures that are looked at.
_FAILURES = 2000


def inputs_of(settings: Settings, files: Sequence[ExportFile]) -> dict[str, str]:
    """A hash of what each date would be made from, by date: names, sizes and times of files, and all settings."""
    known = settings.model_dump(mode="json")
    return {
        date: sha256_json([stat.fingerprint, known])[:16]
        for date, stat in window_stats(files, settings.dataset_window).items()
    }


def given_up(instance: dg.DagsterInstance, inputs: Mapping[str, str]) -> dict[str, str]:
    """The dates that failed for good at their last attempts, all with the inputs that they have; with the reason.

    Args:
        instance: where the history of runs is.
        inputs: as `inputs_of` tells them.
    """
    failures: dict[str, list[str]] = defaultdict(list)
    for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]), limit=_FAILURES):
        date = run.tags.get(PARTITION, "")
        if date in inputs and run.tags.get(INPUTS) == inputs[date]:
            failures[date].append(run.run_id)
    found = {}
    for date, run_ids in failures.items():
        reasons = [_lasting(instance, run_id) for run_id in run_ids[:ATTEMPTS]]
        if len(reasons) == ATTEMPTS and all(reasons):
            found[date] = (
                f"it failed {ATTEMPTS} times with the same exports and settings ({reasons[0]}): "
                f"change them, or run it with --date {date}"
            )
    return found


def given_up_here(settings: Settings, files: Sequence[ExportFile]) -> dict[str, str]:
    """As `given_up`, by the history of this data root; none where no run ever was."""
    from lora_assets.runner import dagster_home

    # Whoever makes the history holds the lock on it.
    if not Path(os.environ.get("DAGSTER_HOME") or settings.data_root / "dagster" / "history").is_dir():
        return {}
    dagster_home(settings)
    with dg.DagsterInstance.get() as instance:
        return given_up(instance, inputs_of(settings, files))


def _lasting(instance: dg.DagsterInstance, run_id: str) -> str | None:
    """Why a run failed, if trying again does not help."""
    entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    broken = failed_steps([entry.dagster_event for entry in entries if entry.dagster_event])
    return next((f"{step.step}: {step.reason}" for step in broken if step.lasting), None)
