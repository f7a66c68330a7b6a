"""The arrival sensor: its decision alone, then a tick on a real instance."""

from pathlib import Path

import dagster as dg
import pytest

from sensors.export_arrival import Cursor, build_export_arrival_sensor, decide

DATES = dg.DynamicPartitionsDefinition(name="dates")
EXPORTS = dg.AssetKey("brain_exports")


def test_a_date_is_ready_only_when_it_stood_still_for_two_ticks() -> None:
    first = decide(Cursor(), {"2026-06-01": "a"}, limit=20)
    assert (first.ready, first.waiting) == ({}, ["2026-06-01"])
    second = decide(first.cursor, {"2026-06-01": "a"}, limit=20)
    assert (second.ready, second.waiting) == ({"2026-06-01": "a"}, [])


def test_a_date_that_still_grows_waits() -> None:
    first = decide(Cursor(), {"2026-06-01": "a"}, limit=20)
    second = decide(first.cursor, {"2026-06-01": "b"}, limit=20)
    assert (second.ready, second.waiting) == ({}, ["2026-06-01"])


def test_a_date_is_asked_for_once_and_again_when_it_changes() -> None:
    cursor = Cursor(seen={"2026-06-01": "a"}, requested={"2026-06-01": "a"})
    assert decide(cursor, {"2026-06-01": "a"}, limit=20).ready == {}
    changed = decide(cursor, {"2026-06-01": "b"}, limit=20)
    assert changed.ready == {}
    assert decide(changed.cursor, {"2026-06-01": "b"}, limit=20).ready == {"2026-06-01": "b"}


def test_many_dates_are_asked_for_in_batches_the_oldest_first() -> None:
    now = {f"2026-06-{day:02d}": "a" for day in range(1, 31)}
    first = decide(Cursor(seen=now), now, limit=20)
    assert list(first.ready) == sorted(now)[:20]
    second = decide(first.cursor, now, limit=20)
    assert list(second.ready) == sorted(now)[20:]


def test_a_date_whose_files_vanished_is_told_and_asked_for_when_it_returns() -> None:
    cursor = Cursor(seen={"2026-06-01": "a"}, requested={"2026-06-01": "a"})
    gone = decide(cursor, {}, limit=20)
    assert gone.vanished == ["2026-06-01"]
    back = decide(gone.cursor, {"2026-06-01": "a"}, limit=20)
    assert decide(back.cursor, {"2026-06-01": "a"}, limit=20).ready == {"2026-06-01": "a"}


@pytest.fixture
def sensor_in(tmp_path: Path) -> dg.SensorDefinition:
    return build_export_arrival_sensor(
        job_name="make",
        partitions=DATES,
        exports=EXPORTS,
        directory=tmp_path / "exports",
        pattern="brain_dataset_*.jsonl",
        interval_seconds=1,
    )


def tick(sensor: dg.SensorDefinition, instance: dg.DagsterInstance, cursor: str | None) -> dg.SensorResult | str:
    context = dg.build_sensor_context(instance=instance, cursor=cursor)
    result = sensor(context)
    if isinstance(result, dg.SkipReason):
        return str(result.skip_message)
    assert isinstance(result, dg.SensorResult)
    return result


def test_a_tick_adds_the_partition_reports_the_exports_and_asks_for_one_run(
    sensor_in: dg.SensorDefinition, tmp_path: Path
) -> None:
    directory = tmp_path / "exports"
    directory.mkdir()
    (directory / "brain_dataset_2026-06-01_a.jsonl").write_text('{"text": "x"}\n')
    (directory / "brain_dataset_2026-06-01_b.jsonl").write_text('{"text": "y"}\n')
    with dg.DagsterInstance.ephemeral() as instance:
        first = tick(sensor_in, instance, None)
        assert isinstance(first, dg.SensorResult)
        assert not first.run_requests
        second = tick(sensor_in, instance, first.cursor)
        assert isinstance(second, dg.SensorResult)
        assert second.run_requests is not None
        assert [request.partition_key for request in second.run_requests] == ["2026-06-01"]
        assert [list(r.partition_keys) for r in second.dynamic_partitions_requests or []] == [["2026-06-01"]]
        (event,) = second.asset_events
        assert event.asset_key == EXPORTS
        assert event.partition == "2026-06-01"
        assert "brain_dataset_2026-06-01_b.jsonl" in str(event.metadata["files"].value)
        third = tick(sensor_in, instance, second.cursor)
        assert isinstance(third, dg.SensorResult)
        assert not third.run_requests


def test_a_directory_that_is_missing_for_a_while_is_not_an_empty_one(
    sensor_in: dg.SensorDefinition, tmp_path: Path
) -> None:
    directory = tmp_path / "exports"
    directory.mkdir()
    (directory / "brain_dataset_2026-06-01.jsonl").write_text('{"text": "x"}\n')
    with dg.DagsterInstance.ephemeral() as instance:
        cursor = None
        for _ in range(2):
            result = tick(sensor_in, instance, cursor)
            assert isinstance(result, dg.SensorResult)
            cursor = result.cursor
        directory.rename(tmp_path / "away")
        skipped = tick(sensor_in, instance, cursor)
        assert isinstance(skipped, str)
        assert str(directory) in skipped
        (tmp_path / "away").rename(directory)
        back = tick(sensor_in, instance, cursor)
        assert isinstance(back, dg.SensorResult)
        assert not back.run_requests, "nothing changed, so nothing may be asked for again"
