"""Sensor, schedules and backfills through the loops of Dagster's daemon, on a real instance and code server.

Time stands still for the daemon, so that a test says when a tick is due. Runs are queued and stay there.
"""

import contextlib
import datetime
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.execution.plan.objects import StepFailureData
from dagster._core.remote_representation.external import RemoteRepository
from dagster._core.scheduler.instigation import InstigatorTick
from dagster._core.test_utils import create_test_daemon_workspace_context, freeze_time
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._daemon.backfill import execute_backfill_iteration
from dagster._daemon.sensor import execute_sensor_iteration
from dagster._scheduler.scheduler import launch_scheduled_runs
from dagster_graphql.client.query import LAUNCH_PARTITION_BACKFILL_MUTATION
from dagster_graphql.test.utils import execute_dagster_graphql
from dagster_shared.error import SerializableErrorInfo

from finetune.layout import DataLayout
from lora_assets.runner import DAGSTER_YAML
from sensors.priority import PRIORITY_TAG
from tests.e2e.conftest import data_root

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
LOGGER = logging.getLogger("tests")
# A Sunday, half an hour before the weekly look at the champion, after the nightly catch-up.
START = datetime.datetime(2026, 6, 7, 3, 30, tzinfo=datetime.UTC)


@dataclass
class Daemon:
    """One instance, and the loops of the daemon on it, each of them run as often as a test asks for."""

    context: WorkspaceProcessContext
    exports: Path
    now: datetime.datetime = START

    @property
    def instance(self) -> dg.DagsterInstance:
        return self.context.instance

    @property
    def repository(self) -> RemoteRepository:
        [entry] = self.context.create_request_context().get_code_location_entries().values()
        assert entry.code_location, entry.load_error
        [repository] = entry.code_location.get_repositories().values()
        return repository

    def export(self, date: str, text: str = "x") -> Path:
        path = self.exports / f"brain_dataset_{date}.jsonl"
        path.write_text(f'{{"text": "{text}"}}\n')
        return path

    def clear(self) -> None:
        """Take all exports away."""
        for file in self.exports.iterdir():
            file.unlink()

    def look(self, times: int = 1) -> InstigatorTick:
        """Ticks of the arrival sensor; returns the last."""
        for _ in range(times):
            self.now += datetime.timedelta(seconds=60)
            with freeze_time(self.now):
                list(execute_sensor_iteration(self.context, LOGGER, None, None))
        sensor = self.repository.get_sensor("export_arrival")
        return self.instance.get_ticks(sensor.get_remote_origin().get_id(), sensor.selector_id, limit=1)[0]

    def wait_until(self, moment: datetime.datetime) -> None:
        """Let the scheduler look at the clock now and then."""
        times: dict[str, object] = {}
        for now in (self.now, moment):
            with freeze_time(now):
                list(launch_scheduled_runs(self.context, LOGGER, now, times))  # type: ignore[arg-type]
        self.now = moment

    def asked(self) -> list[tuple[str, int]]:
        """Dates and priorities of the runs that were asked for since the last call, in the order of the queue."""
        runs = self.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED]))
        for run in runs:
            self.instance.report_run_canceled(run)
        found = [(run.tags.get("dagster/partition", ""), int(run.tags.get(PRIORITY_TAG, 0))) for run in runs]
        return sorted(found, key=lambda each: -each[1])

    def dates(self) -> list[str]:
        return [date for date, _ in self.asked()]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with data_root() as root, pytest.MonkeyPatch.context() as environment:
        home, exports = root / "dagster", DataLayout(root).exports
        for directory in (home, exports):
            directory.mkdir(parents=True)
        # As on one machine, but nothing that is queued is ever started.
        settings = DAGSTER_YAML.read_text().replace("max_concurrent_runs: 1", "max_concurrent_runs: 0")
        (home / "dagster.yaml").write_text(settings)
        environment.setenv("DAGSTER_HOME", str(home))
        environment.setenv("DATA_ROOT", str(root))
        environment.setenv("SENSOR_INTERVAL_SECONDS", "30")
        environment.setenv("ARRIVALS_PER_TICK", "3")
        environment.setenv("TIME_ZONE", "Europe/Kyiv")
        environment.setenv("AUTOMATION_ON", "true")
        target = WorkspaceFileTarget([str(ROOT / "workspace.yaml")])
        with (
            dg.DagsterInstance.from_config(str(home)) as instance,
            create_test_daemon_workspace_context(target, instance) as context,
        ):
            started = Daemon(context, exports)
            for sensor in started.repository.get_sensors():
                if sensor.name != "export_arrival":
                    instance.stop_sensor(sensor.get_remote_origin().get_id(), sensor.selector_id, sensor)
            yield started


@pytest.fixture(autouse=True)
def empty_queue(daemon: Daemon) -> None:
    """Each test has dates of its own; nothing of the one before is queued."""
    daemon.asked()


def test_new_changed_late_and_deleted_exports_through_the_daemon(daemon: Daemon) -> None:
    daemon.export("2026-06-05")
    assert daemon.look().status.value == "SKIPPED", "it may still be written"
    assert daemon.look().status.value == "SUCCESS"
    assert daemon.dates() == ["2026-06-05"]
    assert daemon.instance.has_dynamic_partition("brain_dataset_dates", "2026-06-05")
    exports = dg.AssetKey(["brain", "brain_exports"])
    [told] = daemon.instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=exports, asset_partitions=["2026-06-05"]), limit=10
    ).records
    assert told.asset_materialization
    assert "brain_dataset_2026-06-05.jsonl" in str(told.asset_materialization.metadata["files"].value)

    daemon.export("2026-06-05", "changed")
    daemon.export("2026-06-01")
    daemon.look(2)
    assert daemon.dates() == ["2026-06-05", "2026-06-01"], "a changed date, and a late one"

    (daemon.exports / "brain_dataset_2026-06-01.jsonl").unlink()
    daemon.look()
    assert daemon.dates() == []
    [gone] = daemon.instance.fetch_observations(
        dg.AssetRecordsFilter(asset_key=exports, asset_partitions=["2026-06-01"]), limit=10
    ).records
    assert gone.asset_observation
    assert gone.asset_observation.metadata["deleted"].value is True
    assert daemon.instance.has_dynamic_partition("brain_dataset_dates", "2026-06-01"), "nothing was deleted"


def test_many_dates_at_once_come_in_batches_and_the_newest_has_the_highest_priority(daemon: Daemon) -> None:
    dates = [f"2026-05-0{day}" for day in range(1, 6)]
    for date in dates:
        daemon.export(date)
    daemon.look(2)
    assert daemon.dates() == ["2026-05-05", "2026-05-04", "2026-05-03"]
    daemon.look()
    assert daemon.dates() == ["2026-05-02", "2026-05-01"]


def test_an_unreadable_file_and_a_missing_directory_through_the_daemon(daemon: Daemon) -> None:
    loop = daemon.exports / "brain_dataset_2026-04-01.jsonl"
    loop.symlink_to(loop.name)
    daemon.export("2026-04-02")
    daemon.look(2)
    assert daemon.dates() == ["2026-04-02"]
    away = daemon.exports.rename(daemon.exports.with_name("away"))
    tick = daemon.look()
    assert tick.status.value == "SKIPPED"
    assert "does not exist" in str(tick.skip_reason)
    away.rename(daemon.exports)
    loop.unlink()
    daemon.look()
    assert daemon.dates() == []


KILLED = """
import logging, signal, sys
import dagster as dg
from dagster._core.test_utils import create_test_daemon_workspace_context, freeze_time
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._daemon.sensor import execute_sensor_iteration
home, workspace, now = sys.argv[1:]
flags = {"export_arrival": {"RUN_CREATED": signal.SIGKILL}}
with dg.DagsterInstance.from_config(home) as instance, freeze_time(float(now)):
    with create_test_daemon_workspace_context(WorkspaceFileTarget([workspace]), instance) as context:
        list(execute_sensor_iteration(context, logging.getLogger("killed"), None, None, debug_crash_flags=flags))
"""


def test_a_daemon_killed_in_the_middle_of_a_tick_asks_for_each_date_once(daemon: Daemon, tmp_path: Path) -> None:
    for date in ("2026-03-01", "2026-03-02"):
        daemon.export(date)
    daemon.look()
    daemon.now += datetime.timedelta(seconds=60)
    arguments = [os.environ["DAGSTER_HOME"], str(ROOT / "workspace.yaml"), str(daemon.now.timestamp())]
    log = tmp_path / "killed.log"
    with log.open("w") as output:
        killed = subprocess.Popen(
            [sys.executable, "-c", KILLED, *arguments], stdout=output, stderr=output, start_new_session=True
        )
        returncode = killed.wait(120)
    # Its code server outlives it for a while.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(killed.pid, signal.SIGKILL)
    assert returncode == -signal.SIGKILL, log.read_text()
    assert len(daemon.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.NOT_STARTED]))) == 1
    daemon.look(2)
    runs = daemon.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED]))
    assert sorted(run.tags["dagster/partition"] for run in runs) == ["2026-03-01", "2026-03-02"]


def test_the_nightly_catch_up_asks_for_dates_without_an_adapter_in_the_configured_time_zone(daemon: Daemon) -> None:
    daemon.clear()
    for date in ("2026-02-01", "2026-02-03", "2026-02-02"):
        daemon.export(date)
    midnight = daemon.now.replace(hour=0, minute=0, second=0, microsecond=0) + datetime.timedelta(days=1)
    # Two at night in Kyiv is before midnight in UTC.
    daemon.now = midnight - datetime.timedelta(hours=1, minutes=30)
    daemon.wait_until(midnight - datetime.timedelta(minutes=30))
    assert daemon.dates() == ["2026-02-03", "2026-02-02", "2026-02-01"]


def test_the_champion_is_looked_at_on_sundays(daemon: Daemon) -> None:
    sunday = daemon.now + datetime.timedelta(days=(6 - daemon.now.weekday()) % 7 + 7)
    daemon.now = sunday.replace(hour=0, minute=30)
    daemon.wait_until(sunday.replace(hour=1, minute=30))
    runs = daemon.instance.get_runs(dg.RunsFilter(job_name="champion_drift"))
    assert len(runs) == 1
    assert runs[0].tags["dagster/schedule_name"] == "weekly_drift"


def test_of_a_backfill_the_newest_dates_go_first_and_after_what_arrived(daemon: Daemon) -> None:
    dates = ["2026-01-02", "2026-01-01", "2026-01-03"]
    daemon.instance.add_dynamic_partitions("brain_dataset_dates", dates)
    graph = daemon.context.create_request_context().asset_graph
    daemon.instance.add_backfill(
        PartitionBackfill.from_asset_partitions(
            backfill_id="chosen",
            asset_graph=graph,
            partition_names=dates,
            asset_selection=[dg.AssetKey(["brain", "merged_dataset"])],
            backfill_timestamp=daemon.now.timestamp(),
            tags={},
            dynamic_partitions_store=daemon.instance,
            all_partitions=False,
            title=None,
            description=None,
            run_config=None,
        )
    )
    list(execute_backfill_iteration(daemon.context, LOGGER))
    backfill = daemon.instance.get_backfill("chosen")
    assert backfill
    assert backfill.status == BulkActionStatus.REQUESTED, backfill.error
    daemon.clear()
    daemon.export("2025-12-31")
    daemon.look(2)
    assert daemon.dates() == ["2025-12-31", "2026-01-03", "2026-01-02", "2026-01-01"]


def test_chosen_dates_of_the_job_are_launched_from_the_ui(daemon: Daemon) -> None:
    dates = ["2025-11-01", "2025-11-02", "2025-11-03"]
    daemon.instance.add_dynamic_partitions("brain_dataset_dates", dates)
    context = daemon.context.create_request_context()
    [location] = context.code_locations
    [repository] = location.get_repositories()
    # As the page of the job sends it.
    asked = {
        "selector": {
            "partitionSetName": "train_and_export_partition_set",
            "repositorySelector": {"repositoryName": repository, "repositoryLocationName": location.name},
        },
        "partitionNames": [dates[0], dates[2]],
    }
    answer = execute_dagster_graphql(context, LAUNCH_PARTITION_BACKFILL_MUTATION, {"backfillParams": asked})
    launched = answer.data["launchPartitionBackfill"]
    assert launched["__typename"] == "LaunchBackfillSuccess", launched
    list(execute_backfill_iteration(daemon.context, LOGGER))
    runs = daemon.instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": launched["backfillId"]}))
    assert {run.job_name for run in runs} == {"train_and_export"}
    assert daemon.dates() == [dates[2], dates[0]]
    unknown = {**asked, "partitionNames": ["2025-11-09"]}
    answer = execute_dagster_graphql(context, LAUNCH_PARTITION_BACKFILL_MUTATION, {"backfillParams": unknown})
    assert answer.data["launchPartitionBackfill"]["__typename"] == "PartitionKeysNotFoundError"


def test_a_date_that_fails_for_good_is_asked_for_three_nights_until_something_changes(daemon: Daemon) -> None:
    daemon.clear()
    daemon.export("2025-10-01")
    daemon.export("2025-10-02")

    def next_night() -> list[dg.DagsterRun]:
        midnight = daemon.now.replace(hour=0, minute=0, second=0, microsecond=0) + datetime.timedelta(days=2)
        daemon.now = midnight - datetime.timedelta(hours=1, minutes=30)
        daemon.wait_until(midnight - datetime.timedelta(minutes=30))
        return daemon.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED]))

    def fail(runs: list[dg.DagsterRun], **errors: str) -> list[str]:
        for run in runs:
            date = run.tags["dagster/partition"]
            error = SerializableErrorInfo(f"{errors[date[-2:]]}: out of luck", [], errors[date[-2:]])
            daemon.instance.report_dagster_event(
                dg.DagsterEvent(
                    event_type_value=dg.DagsterEventType.STEP_FAILURE.value,
                    job_name=run.job_name,
                    step_key="brain__adapter",
                    event_specific_data=StepFailureData(error=error, user_failure_data=None),
                ),
                run.run_id,
            )
            daemon.instance.report_run_failed(run)
        return sorted(run.tags["dagster/partition"] for run in runs)

    how = {"01": "DatasetError", "02": "RemoteError"}
    for _ in range(3):
        assert fail(next_night(), **how) == ["2025-10-01", "2025-10-02"]
    assert fail(next_night(), **how) == ["2025-10-02"], "what may pass is tried every night"
    daemon.export("2025-10-01", "another")
    assert fail(next_night(), **how) == ["2025-10-01", "2025-10-02"]
