"""Exports that arrive become partitions and runs.

The decision is a pure function of the cursor and of what lies in the directory; the sensor around it only
lists the directory (names, sizes, times: no file is opened) and hands the decision to Dagster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import dagster as dg
from pydantic import BaseModel

from finetune.dataset.discovery import ExportFile, discover_exports, stat_fingerprint
from finetune.errors import DatasetError


class Cursor(BaseModel):
    """What earlier ticks saw: a fingerprint by date, and the one that a run was asked for."""

    seen: dict[str, str] = {}
    requested: dict[str, str] = {}


@dataclass(frozen=True)
class Decision:
    """What one tick does."""

    cursor: Cursor
    # dates whose files stood still for two ticks and differ from what was asked for, with their fingerprints
    ready: dict[str, str]
    # dates whose files are new or still changing
    waiting: list[str]
    # dates that had files and have none now
    vanished: list[str]


def decide(cursor: Cursor, fingerprints: Mapping[str, str], *, limit: int) -> Decision:
    """Decide which dates are ready.

    A date is ready when its fingerprint is that of the tick before (nobody writes any more) and no run was
    asked for with it. At most `limit` dates are ready at once, the oldest first: the others stay for the next tick.

    Args:
        cursor: what earlier ticks saw.
        fingerprints: the fingerprint of each date's files now.
        limit: the most dates that may be ready in one tick.
    """
    still = {date for date, fingerprint in fingerprints.items() if cursor.seen.get(date) == fingerprint}
    due = [date for date in sorted(still) if cursor.requested.get(date) != fingerprints[date]]
    ready = {date: fingerprints[date] for date in due[:limit]}
    requested = {date: f for date, f in cursor.requested.items() if date in fingerprints} | ready
    return Decision(
        cursor=Cursor(seen=dict(fingerprints), requested=requested),
        ready=ready,
        waiting=sorted(set(fingerprints) - still),
        vanished=sorted(set(cursor.seen) - set(fingerprints)),
    )


def fingerprints_by_date(files: Sequence[ExportFile]) -> dict[str, str]:
    """The fingerprint of each date's own files; `files` sorted by date, as `discover_exports` returns them."""
    return {date: stat_fingerprint(list(group)) for date, group in groupby(files, key=lambda file: file.date)}


def arrival(exports: dg.AssetKey, date: str, files: Sequence[ExportFile]) -> dg.AssetMaterialization:
    """The external asset's materialization for one date.

    Args:
        exports: the external asset.
        date: the dataset date.
        files: that date's own files.
    """
    return dg.AssetMaterialization(
        asset_key=exports,
        partition=date,
        metadata={
            "files": ", ".join(file.name for file in files),
            "bytes": sum(file.size for file in files),
            "directory": dg.MetadataValue.path(str(files[0].path.parent)),
        },
        tags={"dagster/data_version": stat_fingerprint(files)},
    )


def build_export_arrival_sensor(
    *,
    job_name: str,
    partitions: dg.DynamicPartitionsDefinition,
    exports: dg.AssetKey,
    directory: Path,
    pattern: str,
    interval_seconds: int,
    limit: int = 20,
) -> dg.SensorDefinition:
    """A sensor that adds a partition, reports the external asset and asks for a run for each date that is ready.

    Args:
        job_name: what is run for a date.
        partitions: the dataset dates.
        exports: the external asset that is reported.
        directory: what is watched.
        pattern: the file names that count.
        interval_seconds: time between two ticks; a file counts as complete when it stood still between two.
        limit: the most dates that one tick asks for.
    """

    @dg.sensor(
        name="export_arrival",
        job_name=job_name,
        minimum_interval_seconds=interval_seconds,
        description=f"Watches {directory}/{pattern}: a date whose files stood still for two ticks is trained.",
    )
    def export_arrival(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        cursor = Cursor.model_validate_json(context.cursor) if context.cursor else Cursor()
        try:
            files = discover_exports(directory, pattern)
        except DatasetError as error:
            # Not an empty directory: what was seen before stays seen.
            return dg.SkipReason(str(error))
        decision = decide(cursor, fingerprints_by_date(files), limit=limit)
        for date in decision.vanished:
            context.log.warning(f"the exports of {date} are gone from {directory}; what was made from them stays")
        for date in decision.waiting:
            context.log.info(f"{date}: new or still being written, looked at again in the next tick")
        files_of = {date: list(group) for date, group in groupby(files, key=lambda file: file.date)}
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(run_key=f"{date}-{fingerprint}", partition_key=date)
                for date, fingerprint in decision.ready.items()
            ],
            dynamic_partitions_requests=[partitions.build_add_request(list(decision.ready))] if decision.ready else [],
            asset_events=[arrival(exports, date, files_of[date]) for date in decision.ready],
            cursor=decision.cursor.model_dump_json(),
            skip_reason=None if decision.ready else "no date became ready",
        )

    return export_arrival
