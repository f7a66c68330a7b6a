"""Runs that fail or are cancelled leave no row RUNNING in the run log."""

from collections.abc import Callable

import dagster as dg

# Given a Dagster run's id and why it ended, closes its rows and returns their ids.
CloseRows = Callable[[str, str], list[int]]

_INTERVAL_SECONDS = 10


def build_failure_sensor(close_rows: CloseRows) -> dg.SensorDefinition:
    """A sensor that closes the run log's rows of runs that failed without saying so (killed pods, lost nodes).

    Args:
        close_rows: closes the rows of one run.
    """

    @dg.run_failure_sensor(
        name="run_log_closes_failed_runs",
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Marks rows of the run log FAILED whose run is over.",
    )
    def run_log_closes_failed_runs(context: dg.RunFailureSensorContext) -> None:
        run_id, reason = context.dagster_run.run_id, context.failure_event.message or "the run failed"
        if closed := close_rows(run_id, reason):
            context.log.info(f"closed rows {closed} of run {run_id}: {reason}")

    return run_log_closes_failed_runs


def build_cancellation_sensor(close_rows: CloseRows) -> dg.SensorDefinition:
    """A sensor that does what a cancelled step could not do any more: end its rows, and what runs elsewhere for it.

    Args:
        close_rows: closes the rows of one run, and cancels their remote experiments.
    """

    @dg.run_status_sensor(
        run_status=dg.DagsterRunStatus.CANCELED,
        name="run_log_closes_cancelled_runs",
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Marks rows of the run log FAILED whose run was cancelled, and cancels their remote experiments.",
    )
    def run_log_closes_cancelled_runs(context: dg.RunStatusSensorContext) -> None:
        run_id = context.dagster_run.run_id
        if closed := close_rows(run_id, "the run was cancelled"):
            context.log.info(f"closed rows {closed} of the cancelled run {run_id}")

    return run_log_closes_cancelled_runs
