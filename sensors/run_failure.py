"""Runs that end badly leave no row RUNNING in the run log."""

import dagster as dg

from resources.run_log import RunLog


def build_run_log_sensor() -> dg.SensorDefinition:
    """A sensor that closes the run log's rows of runs that failed without saying so (killed pods, lost nodes)."""

    @dg.run_failure_sensor(name="run_log_closes_failed_runs", default_status=dg.DefaultSensorStatus.RUNNING)
    def run_log_closes_failed_runs(context: dg.RunFailureSensorContext, run_log: RunLog) -> None:
        reason = context.failure_event.message or "the run failed"
        closed = run_log.close_run(context.dagster_run.run_id, reason)
        if closed:
            context.log.info(f"closed {closed} rows of run {context.dagster_run.run_id}: {reason}")

    return run_log_closes_failed_runs
