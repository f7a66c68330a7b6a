"""Runs that fail, are cancelled or killed leave no row RUNNING in the run log, and a person is told."""

from collections.abc import Callable

import dagster as dg

# Given a Dagster run's id and why it ended, closes its rows and returns their ids.
CloseRows = Callable[[str, str], list[int]]
# Given a run that has ended, tells people and monitoring of it; never raises.
Report = Callable[[dg.DagsterInstance, dg.DagsterRun], None]
# Closes what was left behind by processes that were killed along with whoever would have noticed; tells of it.
Reconcile = Callable[[dg.DagsterInstance], list[str]]

# Why the rows of a cancelled run are closed.
CANCELLED = "the run was cancelled"
_INTERVAL_SECONDS = 10
_RECONCILIATION_SECONDS = 60


def _silent(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Tells nobody."""


def build_failure_sensor(close_rows: CloseRows, report: Report = _silent) -> dg.SensorDefinition:
    """A sensor that closes the run log's rows of runs that failed without saying so (killed pods, lost nodes).

    Args:
        close_rows: closes the rows of one run.
        report: tells of the run.
    """

    @dg.run_failure_sensor(
        name="run_log_closes_failed_runs",
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Marks rows of the run log FAILED whose run is over.",
    )
    def run_log_closes_failed_runs(context: dg.RunFailureSensorContext) -> None:
        # First, since the run log's database may be what is away.
        report(context.instance, context.dagster_run)
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
        if closed := close_rows(run_id, CANCELLED):
            context.log.info(f"closed rows {closed} of the cancelled run {run_id}")

    return run_log_closes_cancelled_runs


def build_success_sensor(report: Report) -> dg.SensorDefinition:
    """A sensor that tells of runs that succeeded: their figures, and checks that failed without stopping them.

    Args:
        report: tells of the run.
    """

    @dg.run_status_sensor(
        run_status=dg.DagsterRunStatus.SUCCESS,
        name="report_successful_runs",
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Publishes the metrics of runs that succeeded, and alerts of checks that failed in them.",
    )
    def report_successful_runs(context: dg.RunStatusSensorContext) -> None:
        report(context.instance, context.dagster_run)

    return report_successful_runs


def build_reconciliation_sensor(reconcile: Reconcile) -> dg.SensorDefinition:
    """A sensor that finds what no event tells of: processes that were killed, and the daemon with them.

    Args:
        reconcile: closes what they left behind, and tells what it did, and what it could not.
    """

    @dg.sensor(
        name="close_what_was_killed",
        minimum_interval_seconds=_RECONCILIATION_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Ends runs whose process is no more, and rows of the run log that nobody works on.",
    )
    def close_what_was_killed(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        closed = reconcile(context.instance)
        return dg.SkipReason(", ".join(closed) if closed else "nothing was left behind")

    return close_what_was_killed
