"""Exports that arrive become partitions and runs.

The sensor only lists the directory (names, sizes, times: no file is opened) and hands the decision to Dagster.
A tick that is killed at any point is repeated from the cursor of the one before: what it asked for already has
its run key, and partitions are added once.
"""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from finetune.dataset.discovery import ExportFile, list_exports, stat_fingerprint
from finetune.errors import DatasetError
from sensors.arrivals import MAX_DATES, Completeness, Cursor, decide, told
from sensors.priority import priority_tags


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


def departure(exports: dg.AssetKey, date: str) -> dg.AssetObservation:
    """That a date's files are gone: seen on the external asset, and without effect on what was made from them."""
    return dg.AssetObservation(exports, partition=date, metadata={"files": "", "bytes": 0, "deleted": True})


def build_export_arrival_sensor(
    *,
    job_name: str,
    partitions: dg.DynamicPartitionsDefinition,
    exports: dg.AssetKey,
    directory: Path,
    pattern: str,
    complete: Completeness,
    interval_seconds: int,
    limit: int,
    running: bool,
) -> dg.SensorDefinition:
    """A sensor that adds a partition, reports the external asset and asks for a run for each date that is ready.

    Args:
        job_name: what is run for a date.
        partitions: the dataset dates.
        exports: the external asset that is reported.
        directory: what is watched.
        pattern: the file names that count.
        complete: how a file is known to be complete.
        interval_seconds: time between two ticks.
        limit: the most dates that one tick asks for.
        running: whether it is on from the start.
    """

    @dg.sensor(
        name="export_arrival",
        job_name=job_name,
        minimum_interval_seconds=interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED,
        description=f"Watches {directory}/{pattern}: a date with new or changed files is trained once they are "
        "complete.",
    )
    def export_arrival(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        cursor = Cursor.decode(context.cursor)
        try:
            listing = list_exports(directory, pattern)
        except DatasetError as error:
            # Not an empty directory: what was seen before stays seen.
            return dg.SkipReason(str(error))
        decision = decide(cursor, listing, complete=complete, limit=limit)
        if decision.emptied:
            return dg.SkipReason(
                f"{directory} holds no export any more, and did of {len(cursor.requested)} dates: is its volume "
                "mounted? Nothing was changed"
            )
        for date in decision.vanished:
            context.log.warning(f"the exports of {date} are gone from {directory}; what was made from them stays")
        for line in told(decision.waiting):
            context.log.info(line)
        for ready in decision.ready:
            context.log.info(f"{ready.date}: {len(ready.files)} files are complete")
        if decision.forgotten:
            context.log.warning(
                f"exports of {decision.forgotten} dates are older than the newest {MAX_DATES} and not watched: "
                "make them with `lora-assets backfill`"
            )
        dates = [ready.date for ready in decision.ready]
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(
                    run_key=f"{ready.date}-{ready.fingerprint}",
                    partition_key=ready.date,
                    tags=priority_tags("arrival", ready.date),
                )
                for ready in decision.ready
            ],
            dynamic_partitions_requests=[partitions.build_add_request(dates)] if dates else [],
            asset_events=[
                *(arrival(exports, ready.date, ready.files) for ready in decision.ready),
                *(departure(exports, date) for date in decision.vanished),
            ],
            cursor=decision.cursor.encode(),
            skip_reason=None if dates else "no date became ready",
        )

    return export_arrival
