"""Runs that end badly leave no row RUNNING in the run log."""

from collections.abc import Callable

import dagster as dg

# Given a Dagster run's id and why it failed, closes its rows and returns their ids.
CloseRows = Callable[[str, str], list[int]]


def build_run_log_sensor(close_rows: CloseRows) -> dg.SensorDefinition:
    """A sensor that closes the run log's rows of runs that failed without saying so (killed pods, lost nodes).

    Args:
        close_rows: closes the rows of one run.
    """

    @dg.run_failure_sensor(
        name="run_log_closes_failed_runs",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Marks rows of the run log FAILED whose run is over.",
    )
    def run_log_closes_failed_runs(context: dg.RunFailureSensorContext) -> None:
        run_id, reason = context.dagster_run.run_id, context.failure_event.message or "the run failed"
        if closed := close_rows(run_id, reason):
            context.log.info(f"closed rows {closed} of run {run_id}: {reason}")

    return run_log_closes_failed_runs
