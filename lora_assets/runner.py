"""Runs the whole graph of a dataset date in this process, on a Dagster instance that the UI can open."""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import dagster as dg

from finetune.dataset.discovery import ExportFile, discover_exports
from finetune.errors import ConfigurationError, TransientError
from lora_assets.attempts import INPUTS, inputs_of
from lora_assets.interrupts import ends_while_it_waits
from lora_assets.logs import TAGS
from lora_assets.outcome import DateOutcome, date_outcome
from lora_assets.run_end import reconcile, report_end
from lora_assets.run_queue import limit_gpu_pool
from lora_assets.settings import Settings
from sensors.export_arrival import arrival

KILLED = "its process was killed"
DAGSTER_YAML = Path(__file__).with_name("dagster.yaml")


def dagster_home(settings: Settings) -> Path:
    """DAGSTER_HOME, or a folder under the data root that gets the settings for one machine.

    Raises:
        ConfigurationError: the data root cannot be written to.
    """
    configured = os.environ.get("DAGSTER_HOME")
    if configured:
        return Path(configured)
    home = settings.data_root / "dagster"
    try:
        home.mkdir(parents=True, exist_ok=True)
        target = home / "dagster.yaml"
        if not target.exists():
            target.write_bytes(DAGSTER_YAML.read_bytes())
    except OSError as error:
        raise ConfigurationError(
            f"the data root cannot be written to: {error.strerror}",
            where=settings.data_root,
            remedy="Set DATA_ROOT to a directory that this user may write to",
        ) from error
    os.environ["DAGSTER_HOME"] = str(home)
    return home


def run_date(settings: Settings, date: str) -> DateOutcome:
    """Materialize the whole graph of one date.

    Args:
        settings: in force.
        date: the dataset date; its partition is added if need be.

    Raises:
        ConfigurationError: the data root cannot be written to.
        TransientError: another process runs dates on this data root, or the run log's database does not answer.
    """
    home = dagster_home(settings)
    from lora_assets.definitions import cancel_remote_trainings, defs, open_run_log
    from lora_assets.jobs import train_and_export
    from lora_assets.partitions import dataset_dates

    started = time.monotonic()
    with _alone(home), dg.DagsterInstance.get() as instance:
        _close_killed_runs(instance, settings)
        if settings.database_url or settings.layout.postgres.exists():
            # A database that does not answer is better known now than after hours of preparation.
            with open_run_log(settings) as run_log:
                reconcile(settings, instance, run_log)
                cancel_remote_trainings(settings, run_log)
        instance.add_dynamic_partitions(str(dataset_dates.name), [date])
        files = discover_exports(settings.exports, settings.pattern)
        report_arrival(instance, date, [file for file in files if file.date == date])
        inputs = inputs_of(settings, files).get(date)
        limit_gpu_pool(instance, settings.gpus)
        run_id = str(uuid4())

        def close(reason: str) -> None:
            if run := instance.get_run_by_id(run_id):
                instance.report_run_canceled(run, reason)
                instance.event_log_storage.free_concurrency_slots_for_run(run_id)
                report_end(settings, instance, instance.get_run_by_id(run_id) or run)

        with ends_while_it_waits(instance, run_id, close):
            result = defs.resolve_job_def(train_and_export.name).execute_in_process(
                instance=instance,
                run_id=run_id,
                partition_key=date,
                raise_on_error=False,
                run_config={"loggers": {"console": {}}},
                # Whoever started the command decides whether it is tried again, not the daemon.
                tags={**TAGS, "dagster/max_retries": "0", **({INPUTS: inputs} if inputs else {})},
            )
        seconds = time.monotonic() - started
        if run := instance.get_run_by_id(result.run_id):
            report_end(settings, instance, run)
        return date_outcome(date, result.success, result.run_id, result.all_events, seconds)


def run_drift(settings: Settings) -> DateOutcome:
    """Evaluate the champion on what arrived since its training.

    Raises:
        ConfigurationError: the data root cannot be written to.
        TransientError: another process runs dates on this data root.
    """
    home = dagster_home(settings)
    from lora_assets.definitions import defs
    from lora_assets.jobs import champion_drift

    started = time.monotonic()
    with _alone(home), dg.DagsterInstance.get() as instance:
        _close_killed_runs(instance, settings)
        limit_gpu_pool(instance, settings.gpus)
        result = defs.resolve_job_def(champion_drift.name).execute_in_process(
            instance=instance,
            raise_on_error=False,
            run_config={"loggers": {"console": {}}},
            tags={**TAGS, "dagster/max_retries": "0"},
        )
        if run := instance.get_run_by_id(result.run_id):
            report_end(settings, instance, run)
        return date_outcome("drift", result.success, result.run_id, result.all_events, time.monotonic() - started)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Hold the lock that keeps two processes from running dates on one Dagster home.

    Raises:
        TransientError: another process holds it.
    """
    with (home / "run.lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TransientError(
                "another lora-assets run is at work on this data root", where=home, remedy="Run again when it has ended"
            ) from error
        yield


def _close_killed_runs(instance: dg.DagsterInstance, settings: Settings) -> None:
    """End what processes like this one left behind when they were killed: runs, pool slots, rows of the run log.

    Whoever holds the lock knows that no other such process is alive.
    """
    from lora_assets.definitions import close_rows

    unfinished = [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]
    for run in instance.get_runs(dg.RunsFilter(tags=TAGS, statuses=unfinished)):
        instance.report_run_failed(run, KILLED)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        close_rows(settings, run.run_id, KILLED)
        report_end(settings, instance, instance.get_run_by_id(run.run_id) or run)


def report_arrival(instance: dg.DagsterInstance, date: str, files: Sequence[ExportFile]) -> None:
    """Tell the lineage of the date's own files, unless the sensor or an earlier run told of the very same."""
    from lora_assets.assets import dataset

    if not files:
        return
    event = arrival(dataset.brain_exports.key, date, files)
    known = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=event.asset_key, asset_partitions=[date]), limit=1
    ).records
    told = known[0].asset_materialization if known else None
    if told is None or (told.tags or {}).get("dagster/data_version") != (event.tags or {})["dagster/data_version"]:
        instance.report_runless_asset_event(event)
