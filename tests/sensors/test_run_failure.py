"""What the sensors of ended runs do with real runs of a real instance."""

import dagster as dg
import pytest

from sensors.run_failure import (
    build_cancellation_sensor,
    build_failure_sensor,
    build_reconciliation_sensor,
    build_success_sensor,
)

Told = list[tuple[str, str]]


@pytest.fixture
def told() -> Told:
    """What the sensors asked to be closed."""
    return []


@dg.op
def breaks() -> None:
    raise ValueError("no more")


@dg.job
def make() -> None:
    breaks()


def test_a_failed_runs_rows_are_closed_with_the_reason(told: Told) -> None:
    sensor = build_failure_sensor(lambda run, reason: told.append((run, reason)) or [7])
    with dg.DagsterInstance.ephemeral() as instance:
        result = make.execute_in_process(instance=instance, raise_on_error=False)
        context = dg.build_run_status_sensor_context(
            sensor_name=sensor.name,
            dagster_event=result.get_run_failure_event(),
            dagster_instance=instance,
            dagster_run=result.dagster_run,
        ).for_run_failure()
        sensor(context)
    [(run, reason)] = told
    assert run == result.run_id
    assert "Steps failed: ['breaks']" in reason


def test_a_cancelled_runs_rows_are_closed_once_it_is_cancelled(told: Told) -> None:
    sensor = build_cancellation_sensor(lambda run, reason: told.append((run, reason)) or [7])
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(make)
        instance.report_run_canceled(run)
        [event] = [entry for entry in instance.all_logs(run.run_id) if entry.dagster_event]
        assert event.dagster_event is not None
        context = dg.build_run_status_sensor_context(
            sensor_name=sensor.name, dagster_event=event.dagster_event, dagster_instance=instance, dagster_run=run
        )
        sensor(context)
    assert told == [(run.run_id, "the run was cancelled")]


def test_both_watch_from_the_start_and_often() -> None:
    for sensor in (build_failure_sensor(lambda run, reason: []), build_cancellation_sensor(lambda run, reason: [])):
        assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
        assert sensor.minimum_interval_seconds == 10


def failure_context(instance: dg.DagsterInstance, sensor: dg.SensorDefinition) -> dg.RunFailureSensorContext:
    result = make.execute_in_process(instance=instance, raise_on_error=False)
    return dg.build_run_status_sensor_context(
        sensor_name=sensor.name,
        dagster_event=result.get_run_failure_event(),
        dagster_instance=instance,
        dagster_run=result.dagster_run,
    ).for_run_failure()


def test_people_are_told_of_a_failed_run_even_where_its_rows_cannot_be_closed() -> None:
    reported: list[str] = []

    def away(run: str, reason: str) -> list[int]:
        raise RuntimeError("the database is away")

    sensor = build_failure_sensor(away, lambda instance, run: reported.append(run.run_id))
    with dg.DagsterInstance.ephemeral() as instance:
        context = failure_context(instance, sensor)
        with pytest.raises(Exception, match="the database is away"):
            sensor(context)
        assert reported == [context.dagster_run.run_id]


def test_a_successful_run_is_reported() -> None:
    reported: list[str] = []
    sensor = build_success_sensor(lambda instance, run: reported.append(run.run_id))
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.GraphDefinition(name="empty").to_job().execute_in_process(instance=instance)
        event = next(event for event in result.all_events if event.event_type == dg.DagsterEventType.RUN_SUCCESS)
        context = dg.build_run_status_sensor_context(
            sensor_name=sensor.name, dagster_event=event, dagster_instance=instance, dagster_run=result.dagster_run
        )
        sensor(context)
    assert reported == [result.run_id]


def test_what_was_left_behind_is_told_in_the_tick() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        tick = dg.build_sensor_context(instance=instance)
        assert "closed run a, closed row 7" in str(
            build_reconciliation_sensor(lambda _: ["closed run a", "closed row 7"])(tick)
        )
        assert "nothing was left behind" in str(build_reconciliation_sensor(lambda _: [])(tick))
        assert build_reconciliation_sensor(lambda _: []).default_status == dg.DefaultSensorStatus.RUNNING
