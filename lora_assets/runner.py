"""Runs the whole graph of a dataset date in this process, on a Dagster instance that the UI can open."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import dagster as dg
from dagster_shared.error import SerializableErrorInfo
from pydantic import BaseModel, ConfigDict

from finetune.dataset.discovery import discover_exports
from finetune.errors import ConfigurationError, TransientError
from lora_assets.settings import Settings
from sensors.export_arrival import arrival

# Marks the runs that happen in the process of a command, so that the next one can tell which of them were killed.
TAGS = {"lora-assets/entry": "run"}
KILLED = "its process was killed"
DAGSTER_YAML = Path(__file__).with_name("dagster.yaml")


class StepOutcome(BaseModel):
    """How one asset of a run ended."""

    model_config = ConfigDict(frozen=True)

    asset: str
    seconds: float
    figures: dict[str, Any]


class DateOutcome(BaseModel):
    """How the run of one date ended."""

    model_config = ConfigDict(frozen=True)

    date: str
    status: Literal["SUCCESS", "FAILURE"]
    dagster_run_id: str
    seconds: float
    steps: list[StepOutcome]
    failed_checks: list[str]
    error: str | None
    # whether trying again later may help
    transient: bool = False


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


@dg.logger(None, "One short line for each message of an asset: time, asset, message.")
def console(init_context: dg.InitLoggerContext) -> logging.Logger:
    """The log of `lora-assets run`; Dagster's own events stay in the UI."""
    logger = logging.Logger("lora_assets.console", logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(_ShortLine("%(asctime)s %(where)-38s %(text)s", "%H:%M:%S"))
    handler.addFilter(_said_by_an_asset)
    logger.addHandler(handler)
    return logger


def _said_by_an_asset(record: logging.LogRecord) -> bool:
    meta = _meta(record)
    # That a step is left out follows from the failure or skip before it.
    return "dagster_event" not in meta and not str(meta.get("orig_message")).startswith("Dependencies for step")


class _ShortLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        meta = _meta(record)
        record.where = str(meta.get("step_key") or meta.get("job_name") or "")
        record.text = meta.get("orig_message", record.getMessage())
        return super().format(record)


def _meta(record: logging.LogRecord) -> Mapping[str, Any]:
    meta: Mapping[str, Any] = getattr(record, "dagster_meta", {})
    return {name: value for name, value in meta.items() if value is not None}


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
    from lora_assets.definitions import defs, open_run_log
    from lora_assets.jobs import train_and_export
    from lora_assets.partitions import dataset_dates

    started = time.monotonic()
    with _alone(home), dg.DagsterInstance.get() as instance:
        _close_killed_runs(instance, settings)
        if settings.database_url:
            # Better now than after hours of preparation.
            with open_run_log(settings) as run_log:
                run_log.recent(1)
        instance.add_dynamic_partitions(str(dataset_dates.name), [date])
        _report_arrival(instance, settings, date)
        result = defs.resolve_job_def(train_and_export.name).execute_in_process(
            instance=instance,
            partition_key=date,
            raise_on_error=False,
            run_config={"loggers": {"console": {}}},
            tags=TAGS,
        )
        return _outcome(date, result.success, result.run_id, result.all_events, time.monotonic() - started)


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


def _report_arrival(instance: dg.DagsterInstance, settings: Settings, date: str) -> None:
    """Tell the lineage of the date's exports, unless the sensor or an earlier run told of the very same."""
    from lora_assets.assets import dataset

    files = [file for file in discover_exports(settings.exports, settings.pattern) if file.date == date]
    if not files:
        return
    event = arrival(dataset.brain_exports.key, date, files)
    known = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=event.asset_key, asset_partitions=[date]), limit=1
    ).records
    told = known[0].asset_materialization if known else None
    if told is None or (told.tags or {}).get("dagster/data_version") != (event.tags or {})["dagster/data_version"]:
        instance.report_runless_asset_event(event)


def _is_transient(events: Sequence[dg.DagsterEvent]) -> bool:
    """Whether every step that failed did so by an error that may pass."""
    errors = [event.step_failure_data.error for event in events if event.is_step_failure]
    passing = {TransientError.__name__, *(kind.__name__ for kind in TransientError.__subclasses__())}
    return bool(errors) and all(passing & set(_classes(error)) for error in errors)


def _classes(error: SerializableErrorInfo | None) -> Iterator[str]:
    while error is not None:
        yield str(error.cls_name)
        error = error.cause or error.context


def _cause(error: SerializableErrorInfo) -> str:
    """What the step raised, without Dagster's wrapping and the name of its class."""
    while str(error.cls_name).startswith(("Dagster", "RetryRequested")) and (error.cause or error.context):
        error = error.cause or error.context or error
    return error.message.strip().splitlines()[0].split(": ", 1)[-1]


def _outcome(date: str, success: bool, run_id: str, events: Sequence[dg.DagsterEvent], seconds: float) -> DateOutcome:
    durations = {
        event.step_key: event.step_success_data.duration_ms / 1000 for event in events if event.is_step_success
    }
    steps = [
        StepOutcome(
            asset=materialization.asset_key.path[-1],
            seconds=durations.get(event.step_key, 0.0),
            figures={name: value.value for name, value in materialization.metadata.items()},
        )
        for event in events
        if event.is_step_materialization
        for materialization in [event.step_materialization_data.materialization]
    ]
    checks = [
        event.asset_check_evaluation_data
        for event in events
        if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ]
    failed = [f"{check.check_name}: {check.description}" for check in checks if not check.passed]
    errors = [
        f"{event.step_key}: {_cause(event.step_failure_data.error)}"
        for event in events
        if event.is_step_failure
        and event.step_failure_data.error
        # Its own description says more than Dagster's word that it failed.
        and event.step_failure_data.error.cls_name != "DagsterAssetCheckFailedError"
    ]
    errors += [
        f"{check.check_name}: {check.description}"
        for check in checks
        if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR
    ]
    return DateOutcome(
        date=date,
        status="SUCCESS" if success else "FAILURE",
        dagster_run_id=run_id,
        seconds=seconds,
        steps=steps,
        failed_checks=failed,
        transient=_is_transient(events),
        error=None if success else "; ".join(errors or ["see the Dagster UI"]),
    )
