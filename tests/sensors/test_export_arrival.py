"""Ticks of the arrival sensor on real directories and an ephemeral instance; its decisions are in test_arrivals.py."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from finetune.dataset.discovery import list_exports
from sensors.export_arrival import build_export_arrival_sensor
from sensors.priority import PRIORITY_TAG, priority_tags

DATES = dg.DynamicPartitionsDefinition(name="dates")
EXPORTS = dg.AssetKey("brain_exports")
DATE = "2026-06-01"
NOBODY = 65534


@pytest.fixture
def exports(tmp_path: Path) -> Path:
    directory = tmp_path / "exports"
    directory.mkdir()
    return directory


def export(directory: Path, name: str = DATE) -> Path:
    path = directory / f"brain_dataset_{name}.jsonl"
    path.write_text('{"text": "x"}\n')
    return path


@pytest.fixture
def sensor(exports: Path) -> dg.SensorDefinition:
    return build_export_arrival_sensor(
        job_name="make",
        partitions=DATES,
        exports=EXPORTS,
        directory=exports,
        pattern="brain_dataset_*.jsonl",
        complete="still",
        interval_seconds=1,
        limit=20,
        running=False,
    )


def ticks(sensor: dg.SensorDefinition, count: int, cursor: str | None = None) -> dg.SensorResult:
    """The result of the last of so many ticks."""
    with dg.DagsterInstance.ephemeral() as instance:
        for _ in range(count):
            result = sensor(dg.build_sensor_context(instance=instance, cursor=cursor))
            assert isinstance(result, dg.SensorResult), result
            cursor = result.cursor
    return result


def skipped(sensor: dg.SensorDefinition, cursor: str | None) -> str:
    with dg.DagsterInstance.ephemeral() as instance:
        result = sensor(dg.build_sensor_context(instance=instance, cursor=cursor))
    assert isinstance(result, dg.SkipReason)
    return str(result.skip_message)


def asked(result: dg.SensorResult) -> list[str | None]:
    return [request.partition_key for request in result.run_requests or []]


def test_a_tick_adds_the_partition_reports_the_exports_and_asks_for_one_run(
    sensor: dg.SensorDefinition, exports: Path
) -> None:
    export(exports, f"{DATE}_a")
    export(exports, f"{DATE}_b")
    assert asked(ticks(sensor, 1)) == []
    result = ticks(sensor, 2)
    assert asked(result) == [DATE]
    assert [list(request.partition_keys) for request in result.dynamic_partitions_requests or []] == [[DATE]]
    [event] = result.asset_events
    assert isinstance(event, dg.AssetMaterialization)
    assert (event.asset_key, event.partition) == (EXPORTS, DATE)
    assert "brain_dataset_2026-06-01_b.jsonl" in str(event.metadata["files"].value)
    [request] = result.run_requests or []
    assert request.run_key == f"{DATE}-{(event.tags or {})['dagster/data_version']}"
    assert asked(ticks(sensor, 3)) == []


def test_a_date_whose_files_are_gone_is_observed_on_the_asset(sensor: dg.SensorDefinition, exports: Path) -> None:
    gone = export(exports)
    export(exports, "2026-06-02")
    cursor = ticks(sensor, 2).cursor
    gone.unlink()
    result = ticks(sensor, 1, cursor)
    [event] = result.asset_events
    assert isinstance(event, dg.AssetObservation)
    assert (event.partition, event.metadata["deleted"].value) == (DATE, True)
    assert not result.run_requests


def test_a_directory_that_is_missing_or_empty_for_a_while_changes_nothing(
    sensor: dg.SensorDefinition, exports: Path
) -> None:
    export(exports)
    cursor = ticks(sensor, 2).cursor
    away = exports.rename(exports.with_name("away"))
    assert str(exports) in skipped(sensor, cursor)
    exports.mkdir()
    assert "is its volume mounted" in skipped(sensor, cursor)
    exports.rmdir()
    away.rename(exports)
    assert asked(ticks(sensor, 2, cursor)) == [], "nothing changed, so nothing may be asked for again"


def test_a_file_without_a_date_in_its_name_has_that_of_its_modification(
    sensor: dg.SensorDefinition, exports: Path
) -> None:
    os.utime(export(exports, "part"), (1_780_300_000, 1_780_300_000))
    assert asked(ticks(sensor, 2)) == ["2026-06-01"]


def test_what_is_being_written_under_a_name_of_its_own_is_not_looked_at(exports: Path) -> None:
    for name in (".brain.jsonl", "brain.jsonl.tmp", "brain.jsonl.part", "brain.jsonl~", "brain.jsonl.done"):
        (exports / name).touch()
    (exports / "folder.jsonl").mkdir()
    assert list_exports(exports, "*").files == []
    assert [file.name for file in list_exports(exports, "*").files] == []
    assert list(list_exports(exports, "*").done) == ["brain.jsonl"]


def test_a_link_that_leads_nowhere_is_told_and_others_go_on(sensor: dg.SensorDefinition, exports: Path) -> None:
    loop = exports / f"brain_dataset_{DATE}.jsonl"
    loop.symlink_to(loop.name)
    export(exports, "2026-06-02")
    assert list(list_exports(exports).broken) == [loop.name]
    assert asked(ticks(sensor, 2)) == ["2026-06-02"]


@pytest.fixture
def readable_by_all() -> Iterator[Path]:
    """A directory that another user may look into; pytest's own are closed to them."""
    directory = Path(tempfile.mkdtemp(prefix="exports-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def test_a_file_that_this_user_may_not_read_is_known_by_its_name(readable_by_all: Path) -> None:
    closed = export(readable_by_all)
    closed.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(NOBODY)
    try:
        found = list_exports(readable_by_all)
    finally:
        os.seteuid(user)
    assert found.unreadable == {closed.name: "this user may not read it"}
    assert [file.date for file in found.files] == [DATE]


def test_fresh_dates_and_arrivals_go_first() -> None:
    asked_for = [
        priority_tags("backfill", "2026-06-01"),
        priority_tags("backfill", "2026-06-02"),
        priority_tags("schedule", "2000-01-01"),
        priority_tags("schedule", "2099-12-31"),
        priority_tags("arrival", "2000-01-01"),
        priority_tags("arrival", "2026-06-01"),
    ]
    numbers = [int(tags[PRIORITY_TAG]) for tags in asked_for]
    assert numbers == sorted(set(numbers))
