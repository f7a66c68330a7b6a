"""What runs by the clock: the nightly catch-up and the weekly look at the champion's drift."""

from functools import partial
from itertools import groupby

import dagster as dg

from finetune.dataset.discovery import discover_exports
from finetune.errors import ConfigurationError, DatasetError
from lora_assets.attempts import INPUTS, given_up, inputs_of
from lora_assets.catch_up import catch_up
from lora_assets.freshness import date_states
from lora_assets.jobs import champion_drift, train_and_export
from lora_assets.partitions import dataset_dates
from lora_assets.runner import report_arrival
from lora_assets.settings import Settings
from sensors.priority import priority_tags

_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]


def build_schedules(settings: Settings) -> list[dg.ScheduleDefinition]:
    """The schedules, on from the start where AUTOMATION_ON says so.

    Raises:
        ConfigurationError: CATCH_UP_CRON or DRIFT_CRON is no cron line.
    """
    status = dg.DefaultScheduleStatus.RUNNING if settings.automation_on else dg.DefaultScheduleStatus.STOPPED
    try:
        return [
            dg.schedule(
                name="nightly_catch_up",
                job=train_and_export,
                cron_schedule=settings.catch_up_cron,
                execution_timezone=settings.time_zone,
                default_status=status,
                description="Asks for each date without a good adapter, and for the newest whose inputs changed.",
            )(partial(_nightly, settings)),
            dg.ScheduleDefinition(
                name="weekly_drift",
                job=champion_drift,
                cron_schedule=settings.drift_cron,
                execution_timezone=settings.time_zone,
                default_status=status,
                description="Evaluates the champion on all held-out data that arrived since its training.",
            ),
        ]
    except dg.DagsterInvalidDefinitionError as error:
        raise ConfigurationError(
            f"not a cron line: {settings.catch_up_cron!r} or {settings.drift_cron!r}",
            where="CATCH_UP_CRON, DRIFT_CRON",
            remedy="Minute, hour, day of the month, month, day of the week: 0 2 * * * is two at night",
        ) from error


def _nightly(settings: Settings, context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
    try:
        files = discover_exports(settings.exports, settings.pattern)
    except DatasetError as error:
        return dg.SkipReason(str(error))
    states = date_states(settings, files)
    inputs = inputs_of(settings, files)
    chosen = catch_up(
        settings, files, states, busy=busy_dates(context.instance), given_up=given_up(context.instance, inputs)
    )
    for date, why in chosen.left.items():
        context.log.info(f"{date} is left for another time: {why}")
    if not chosen.dates:
        left = f"; {len(chosen.left)} are left for another time" if chosen.left else ""
        return dg.SkipReason(f"no date of {len(states)} is asked for{left}")
    # The arrival sensor may be off, or may not have seen them yet.
    context.instance.add_dynamic_partitions(str(dataset_dates.name), chosen.dates)
    own = {date: list(of) for date, of in groupby(files, key=lambda file: file.date)}
    for date in chosen.dates:
        report_arrival(context.instance, date, own[date])
    # Of this tick: CATCH_UP_CRON may have several a day.
    tick = context.scheduled_execution_time.isoformat(timespec="minutes")
    return [
        dg.RunRequest(
            run_key=f"{date}-{tick}",
            partition_key=date,
            tags={**priority_tags("schedule", date), INPUTS: inputs[date]},
        )
        for date in chosen.dates
    ]


def busy_dates(instance: dg.DagsterInstance) -> set[str]:
    """Dates of which a run is queued or under way, whoever asked for it."""
    runs = instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED))
    return {date for run in runs if (date := run.tags.get("dagster/partition"))}
