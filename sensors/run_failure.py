"""Runs that end badly leave no row RUNNING in the run log."""

import dagster as dg

from resources.run_log import RunLog


def build_run_log_sensor() -> dg.SensorDefinition:
    """A sensor that closes the run log's rows of runs that failed without saying so (killed pods, lost nodes)."""

    @dg.run_failure_sensor(name="run_log_closes_failed_runs", default_status=dg.DefaultSensorStatus.RUNNING)
    def run_log_closes_failed_runs(context: dg.RunFailureSensorContext, run_log: RunLog) -> None:
        reason = context.failure_event.message or "the run failed"
        run_id = context.dagster_run.run_id
        closed = run_log.close_orphans(lambda owner: reason if owner == run_id else None)
        if closed:
            context.log.info(f"closed rows {closed} of run {run_id}: {reason}")

    return run_log_closes_failed_runs
