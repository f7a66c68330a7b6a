"""What is done when a run has ended, however it ended: rows are closed, people are told, figures are published."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from finetune.errors import ConfigurationError, FinetuneError, TransientError
from finetune.redaction import Redactor
from lora_assets.logs import PARTITION, TAGS
from lora_assets.metrics import publish_metrics
from lora_assets.outcome import failed_checks, failed_steps
from lora_assets.settings import Settings, load_settings
from resources.alerts import Alert, Alerts
from resources.run_log import RunLog
from resources.training_run import TrainingRun
from sensors.run_failure import CANCELLED

_logger = logging.getLogger(__name__)

# Checks that warn only, and of which a person is to know all the same.
TOLD_WARNINGS = {"champion_drift"}
_WILL_RETRY = "dagster/will_retry"
_PASSING = "It was tried again and failed each time. Once the cause is gone: {command}; finished work is used again."
_LASTING = "Trying again does not help. Do what the reason says, then: {command}"
_CHECK = "Nothing was made from it. See the check's figures in the UI, then: {command}"
_WARNING = "Nothing was stopped. See the check's figures in the UI."
_KILLED = "Nothing was lost: the next run goes on from the last checkpoint. If none starts by itself: {command}"
_PID = "Started process for run (pid: "


def build_alerts(settings: Settings) -> Alerts:
    """The alerts of ALERT_WEBHOOK_URL."""
    url = settings.alert_webhook_url
    return Alerts(
        url.get_secret_value() if url else None,
        state=settings.data_root / "alerts" / f"{settings.pipeline_name}.json",
        interval=settings.alert_interval_seconds,
        limit=settings.alert_limit,
        redact=Redactor(settings.secrets),
        ui_url=settings.dagster_ui_url,
    )


def report_end(settings: Settings, instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Tell of what went wrong in a run that has ended, and publish its figures; never raises."""
    try:
        for alert in alerts_of(instance, run):
            build_alerts(settings).send(alert)
        publish_metrics(settings, instance, run)
    except Exception:
        # The run itself is over, and how it ended is in Dagster's own history.
        _logger.exception("the end of run %s could not be reported", run.run_id)


def tell_not_begun(error: FinetuneError) -> None:
    """Tell of what keeps a command from running anything: nobody looks at what a CronJob prints.

    That another command is at work is no trouble.
    """
    if type(error) is TransientError:
        return
    passing = isinstance(error, TransientError)
    remedy = "The next one tries again." if passing else "Do what the reason says: the next one meets the same."
    try:
        build_alerts(load_settings()).send(Alert("lora-assets run could not begin", str(error), remedy))
    except ConfigurationError:
        # Where the settings are wrong nobody knows whom to tell.
        return


def alerts_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> list[Alert]:
    """What a person is to know of a run that has ended; nothing of one that Dagster is about to try again."""
    entries = instance.all_logs(
        run.run_id,
        of_type={
            dg.DagsterEventType.STEP_FAILURE,
            dg.DagsterEventType.ASSET_CHECK_EVALUATION,
            dg.DagsterEventType.RUN_FAILURE,
        },
    )
    events = [entry.dagster_event for entry in entries if entry.dagster_event]
    alerts = [_of_check(run, check, blocked=run.status == dg.DagsterRunStatus.FAILURE) for check in _told(events)]
    if run.status != dg.DagsterRunStatus.FAILURE or run.tags.get(_WILL_RETRY) == "true":
        return alerts
    broken = [step for step in failed_steps(events) if not step.gate]
    if broken:
        passing = all(step.transient for step in broken)
        alerts.append(
            Alert(
                title=f"{run.job_name} failed",
                reason="; ".join(step.reason for step in broken),
                remedy=(_PASSING if passing else _LASTING).format(command=_command(run)),
                run_id=run.run_id,
                date=run.tags.get(PARTITION),
                step=", ".join(step.step for step in broken),
            )
        )
    elif not alerts:
        messages = [event.message for event in events if event.is_run_failure and event.message]
        reason = messages[-1] if messages else "its process ended without a word"
        alerts.append(_of_process(run, reason))
    return alerts


def reconcile(
    settings: Settings,
    instance: dg.DagsterInstance,
    run_log: RunLog,
) -> list[TrainingRun]:
    """Close the rows of processes that were killed along with whoever would have noticed.

    These are rows whose Dagster run is over here, and rows whose lease nobody renews.

    Args:
        settings: in force.
        instance: whose runs they may be.
        run_log: whose rows are looked at.

    Returns:
        The rows that were closed.
    """
    closed = run_log.close_orphans(lambda run_id: _why_over(instance, run_id)) + run_log.close_abandoned()
    for row in closed:
        run = instance.get_run_by_id(row.dagster_run_id) if row.dagster_run_id else None
        if run is None or run.tags.get(_WILL_RETRY) != "true":
            _tell_of_row(settings, row)
    return closed


def fail_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fail the runs that say STARTED though their process on this machine is no more; returns their ids.

    For the code server, whose child every run is that Dagster's default launcher starts: no monitoring of
    Dagster's looks after those, and after a restart of the machine they would hold their slots for ever.
    Other launchers are asked by Dagster's own monitoring; the runs of `lora-assets run` are ended by the next
    such command, which holds the lock that tells.
    """
    if instance.run_launcher.supports_check_run_worker_health:
        return []
    started = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
    dead = [run for run in started if not TAGS.items() <= run.tags.items() and _is_dead(instance, run.run_id)]
    for run in dead:
        instance.report_run_failed(run, "its process was killed")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return [run.run_id for run in dead]


def _told(events: Sequence[dg.DagsterEvent]) -> list[dg.AssetCheckEvaluation]:
    return [
        check
        for check in failed_checks(events)
        if check.severity == dg.AssetCheckSeverity.ERROR or check.check_name in TOLD_WARNINGS
    ]


def _of_check(run: dg.DagsterRun, check: dg.AssetCheckEvaluation, *, blocked: bool) -> Alert:
    return Alert(
        title=f"Check {check.check_name} failed",
        reason=check.description or "it says no more",
        remedy=(_CHECK if blocked else _WARNING).format(command=_command(run)),
        run_id=run.run_id,
        date=run.tags.get(PARTITION),
        step=check.asset_key.to_user_string(),
    )


def _of_process(run: dg.DagsterRun, reason: str) -> Alert:
    return Alert(
        title=f"{run.job_name} failed",
        reason=reason,
        remedy=_KILLED.format(command=_command(run)),
        run_id=run.run_id,
        date=run.tags.get(PARTITION),
    )


def _tell_of_row(settings: Settings, row: TrainingRun) -> None:
    command = f"lora-assets run --date {row.dataset_date}" if row.dataset_date else "lora-assets run"
    build_alerts(settings).send(
        Alert(
            title="A training was killed",
            reason=row.error_message or "",
            remedy=_KILLED.format(command=command),
            run_id=row.dagster_run_id,
            date=row.dataset_date,
            step="adapter",
        )
    )


def _command(run: dg.DagsterRun) -> str:
    date = run.tags.get(PARTITION)
    return f"lora-assets run --date {date}, or materialize {date} in the UI" if date else "start it again in the UI"


def _why_over(instance: dg.DagsterInstance, run_id: str) -> str | None:
    """Why nobody works on a run any more; None where somebody may, or where its history is not here."""
    run = instance.get_run_by_id(run_id)
    if run is None or not run.is_finished:
        return None
    return CANCELLED if run.status == dg.DagsterRunStatus.CANCELED else f"its Dagster run ended as {run.status.value}"


def _is_dead(instance: dg.DagsterInstance, run_id: str) -> bool:
    entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
    starts = [
        (int(entry.message.split(_PID)[1].split(")")[0]), entry.timestamp) for entry in entries if _PID in entry.message
    ]
    if not starts or not Path("/proc/stat").exists():
        return False
    pid, said_at = starts[-1]
    began = _began(pid)
    # A process that began later was given the number since.
    return began is None or began > said_at + 1


def _began(pid: int) -> float | None:
    """When a process began, in seconds since the epoch; None if there is none (proc(5): field 22, and btime)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in "ZX":
        return None
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
