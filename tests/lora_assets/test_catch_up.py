"""Which dates a catch-up makes, as a table; what it reads from disk, and the commands that share the decision."""

import datetime
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from typer.testing import CliRunner

from finetune.dataset.discovery import ExportFile, discover_exports, stat_fingerprint
from lora_assets.catch_up import CatchUp, catch_up, choose, estimated_hours
from lora_assets.cli.app import app
from lora_assets.freshness import date_states
from lora_assets.schedules import _nightly
from lora_assets.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
A, B, C = "2026-06-01", "2026-06-02", "2026-06-03"


@pytest.mark.parametrize(
    ("hours", "budget", "busy", "dates", "left"),
    [
        ({}, None, [], [C, B, A], []),
        ({}, None, [B], [C, A], [B]),
        ({A: 1.0, B: 1.0, C: 1.0}, 2.0, [], [C, B], [A]),
        ({A: 1.0, B: 5.0, C: 1.0}, 2.0, [], [C, A], [B]),
        ({A: 1.0, B: 5.0, C: 9.0}, 2.0, [], [A], [B, C]),
        ({A: 1.0, B: 1.0, C: 1.0}, 2.0, [C], [B, A], [C]),
        ({}, 2.0, [], [C], [A, B]),
        ({A: 1.0}, 2.0, [], [C, A], [B]),
    ],
    ids=[
        "without a budget all are made, the newest first",
        "what is under way is not asked for again",
        "the newest come first within the budget",
        "one that does not fit makes room for a smaller one",
        "one that never fits keeps no other from being made",
        "what is under way takes nothing of the budget",
        "of what nobody can tell one is tried",
        "beside what is known one unknown is tried",
    ],
)
def test_what_is_made_within_a_budget(
    hours: dict[str, float | None], budget: float | None, busy: list[str], dates: list[str], left: list[str]
) -> None:
    chosen = choose([B, A, C], hours, budget=budget, busy=busy)
    assert (chosen.dates, sorted(chosen.left)) == (dates, left)


def test_why_a_date_is_left_is_told_with_the_figures() -> None:
    chosen = choose([A, B], {A: 3.0, B: 1.5}, budget=4.0)
    assert chosen.left == {A: "it needs about 3 GPU-hours, and 2.5 of 4 are left"}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    settings = load_settings()
    settings.exports.mkdir(parents=True)
    return settings


def export(settings: Settings, date: str, size: int = 100) -> Path:
    path = settings.exports / f"brain_dataset_{date}.jsonl"
    path.write_text("x" * size)
    return path


def value(settings: Settings, asset: str, date: str, /, **content: object) -> None:
    path = settings.layout.asset_values / "brain" / asset / f"{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def trained(settings: Settings, files: list[ExportFile], date: str, *, tokens: int, speed: float) -> None:
    """What a date that was planned and trained leaves behind, as far as an estimate reads it."""
    window = [file for file in files if file.date <= date]
    counts = {"lines": 1, "train": 1, "eval": 0, "duplicates": 0, "rejected": 0, "blank": 0}
    value(
        settings,
        "merged_dataset",
        date,
        path="p",
        date=date,
        fingerprint="f",
        window_dates=[date],
        counts=counts,
        rejects_by_reason={},
        rejects_by_file={},
        stat_fingerprint=stat_fingerprint(window),
    )
    memory = {"vram_gb": 1, "fits": None, "limit_gb": None, "model_params": 1, "trainable_params": 1, "parts": {}}
    value(
        settings,
        "training_plan",
        date,
        trial_config={"trial_id": "t"},
        search_space={},
        memory_estimate=memory,
        explanations=[],
        estimated_steps=1,
        estimated_tokens=tokens,
    )
    value(
        settings,
        "adapter",
        date,
        status="completed",
        run_id="r",
        backend="hf-peft",
        adapter_path=None,
        adapter_hash=None,
        training_steps=1,
        gpu_hours=1,
        final_loss=1,
        tokens_per_second=speed,
        device="NVIDIA H200",
    )


def test_hours_come_from_what_earlier_trainings_took(settings: Settings) -> None:
    for date in (A, B, C):
        export(settings, date)
    files = discover_exports(settings.exports)
    assert estimated_hours(settings, files, [C]) == {C: None}, "nothing is known yet"
    trained(settings, files, A, tokens=3_600_000, speed=1000.0)
    found = estimated_hours(settings, files, [A, B, C])
    # The window of B holds twice the bytes of that of A, the one of C three times.
    assert found == {A: pytest.approx(1.0), B: pytest.approx(2.0), C: pytest.approx(3.0)}


def test_a_plan_of_exports_that_have_changed_since_is_scaled_to_their_size(settings: Settings) -> None:
    export(settings, A)
    trained(settings, discover_exports(settings.exports), A, tokens=3_600_000, speed=1000.0)
    export(settings, B, size=300)
    files = discover_exports(settings.exports)
    assert estimated_hours(settings, files, [B]) == {B: pytest.approx(4.0)}


def test_the_budget_is_a_setting(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATCH_UP_GPU_HOURS", "3.5")
    for date in (A, B, C):
        export(settings, date)
    files = discover_exports(settings.exports)
    trained(settings, files, A, tokens=3_600_000, speed=1000.0)
    chosen = catch_up(load_settings(), files, date_states(settings, files))
    assert (chosen.dates, list(chosen.left)) == ([C], [B, A])
    assert catch_up(settings, files, date_states(settings, files)) == CatchUp([C, B, A])


def planned(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    return list(json.loads(result.stdout)["to_make"])


def test_run_makes_the_newest_first_and_backfill_the_oldest(settings: Settings) -> None:
    for date in (B, A, C):
        export(settings, date)
    assert planned("run") == [C, B, A]
    assert planned("run", "--latest") == [C]
    assert planned("backfill", "--from", A, "--to", B) == [A, B]
    assert planned("backfill", "--from", "2020-01-01", "--to", "2030-01-01") == [A, B, C]
    assert not (settings.data_root / "dagster").exists(), "a dry run changes nothing"


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [
        (B, A, "--from 2026-06-02 is after --to 2026-06-01"),
        ("2026-06-31", C, "--from 2026-06-31 is no date"),
        (A, "yesterday", "--to yesterday is no date"),
        ("2020-01-01", "2020-12-31", "no exports from 2020-01-01 to 2020-12-31"),
    ],
)
def test_a_wrong_range_is_told_in_one_line(settings: Settings, first: str, last: str, told: str) -> None:
    export(settings, A)
    result = CliRunner().invoke(app, ["backfill", "--from", first, "--to", last])
    assert result.exit_code == 1
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_each_tick_of_a_day_asks_anew_and_the_same_tick_once(settings: Settings, tmp_path: Path) -> None:
    export(settings, A)

    def run_keys(hour: int) -> list[str | None]:
        moment = datetime.datetime(2026, 6, 7, hour, tzinfo=datetime.UTC)
        with dg.build_schedule_context(instance, scheduled_execution_time=moment) as context:
            requests = _nightly(settings, context)
        assert isinstance(requests, list)
        return [request.run_key for request in requests]

    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        morning, again, evening = run_keys(2), run_keys(2), run_keys(14)
    assert len(morning) == 1
    assert morning == again
    assert morning != evening


def finish(settings: Settings, date: str) -> None:
    """What a date that was made whole leaves behind, as far as its state is read from it."""
    trained(settings, discover_exports(settings.exports), date, tokens=1, speed=1.0)
    prepared = settings.data_root / "prepared"
    prepared.mkdir(exist_ok=True)
    (prepared / "manifest.json").touch()
    path = settings.layout.asset_values / "brain" / "merged_dataset" / f"{date}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"path": str(prepared)}))
    value(
        settings,
        "registered_adapter",
        date,
        version="v1",
        adapter_hash="a",
        stored_path="p",
        created_at="2026-06-01T00:00:00Z",
        run_id="r",
        trial_id="t",
        metrics={},
        tags={},
        lineage={"dataset_fingerprint": "f", "recipe": settings.recipe},
        status="challenger",
        reason="",
    )


# The command itself in a process of its own; a date takes no time, and the machine may be lost at the second.
BACKFILL = """
import os, signal, sys
from lora_assets import runner
from lora_assets.cli.app import app
from lora_assets.outcome import DateOutcome
from tests.lora_assets.test_catch_up import finish

def run_date(settings, date):
    if date == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(settings, date)
    return DateOutcome(
        date=date, status="SUCCESS", dagster_run_id="r", seconds=0, steps=[], failed_checks=[], error=None
    )

runner.run_date = run_date
app(["backfill", "--from", "2026-06-01", "--to", "2026-06-03", "--json"])
"""


def test_a_backfill_that_was_killed_goes_on_where_it_stood(settings: Settings) -> None:
    for date in (A, B, C):
        export(settings, date)

    def backfill(killed_at: str = "never") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BACKFILL, killed_at]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    assert backfill(killed_at=B).returncode == -signal.SIGKILL
    assert planned("backfill", "--from", A, "--to", C) == [B, C]
    done = backfill()
    assert done.returncode == 0, done.stderr
    assert [run["date"] for run in json.loads(done.stdout)["runs"]] == [B, C]
    assert json.loads(backfill().stdout)["runs"] == []
    export(settings, B, size=7)
    assert planned("backfill", "--from", A, "--to", C) == [B, C], "the window of C holds B"
