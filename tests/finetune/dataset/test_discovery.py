from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from finetune.dataset import discovery
from finetune.dataset.discovery import (
    ExportFile,
    content_fingerprint,
    date_in_name,
    discover_exports,
    stat_fingerprint,
    window_of,
    window_stats,
)
from finetune.errors import ConfigurationError, DatasetError, TransientError


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("brain_dataset_2026-06-01.jsonl", "2026-06-01"),
        ("brain_dataset_20260601.jsonl", "2026-06-01"),
        ("brain_dataset_2026_06_01.jsonl", "2026-06-01"),
        ("brain_dataset_2026.06.01.jsonl", "2026-06-01"),
        ("brain_dataset_2026-06-01_part-0003.jsonl", "2026-06-01"),
        ("brain_dataset_20260601_235959.jsonl", "2026-06-01"),
        ("brain_dataset_20260601235959.jsonl", "2026-06-01"),
        ("brain_dataset_2026-06-01T23-59-59Z.jsonl", "2026-06-01"),
        ("brain_dataset_v12_20260601.jsonl", "2026-06-01"),
        ("brain_dataset_20261301.jsonl", None),
        ("brain_dataset_2026-02-30.jsonl", None),
        ("brain_dataset_1717200000.jsonl", None),
        ("brain_dataset_final.jsonl", None),
    ],
)
def test_the_date_is_read_from_the_name_in_its_usual_forms(name: str, date: str | None) -> None:
    assert date_in_name(name) == date


def test_exports_come_by_date_and_name_and_nothing_else_comes(tmp_path: Path) -> None:
    for name in ("brain_dataset_2026-06-02.jsonl", "brain_dataset_20260601_b.jsonl", "brain_dataset_20260601_a.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "brain_dataset_2026-06-03.jsonl.part").touch()
    (tmp_path / "other_2026-06-03.jsonl").touch()
    (tmp_path / "brain_dataset_2026-06-04.jsonl").mkdir()

    found = discover_exports(tmp_path)

    assert [file.name for file in found] == [
        "brain_dataset_20260601_a.jsonl",
        "brain_dataset_20260601_b.jsonl",
        "brain_dataset_2026-06-02.jsonl",
    ]
    assert [file.date for file in found] == ["2026-06-01", "2026-06-01", "2026-06-02"]
    assert found[0].size == 3


def test_a_name_without_a_date_takes_the_day_of_the_last_change_in_utc(tmp_path: Path) -> None:
    path = tmp_path / "brain_dataset_final.jsonl"
    path.touch()
    os.utime(path, (1780358399, 1780358399))  # 2026-06-01 23:59:59 UTC

    assert [file.date for file in discover_exports(tmp_path)] == ["2026-06-01"]


def test_a_missing_directory_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist") as caught:
        discover_exports(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(caught.value)


def test_a_file_in_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="cannot be read"):
        discover_exports(tmp_path / "file")


def test_a_directory_without_read_permission_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    directory = tmp_path / "closed"
    directory.mkdir()
    (directory / "brain_dataset_2026-06-01.jsonl").touch()
    tmp_path.chmod(0o755)
    directory.chmod(0o000)
    # Root may read everything, so a child gives that up first.
    program = (
        "import os, sys, pathlib; from finetune.dataset.discovery import discover_exports\n"
        "os.chdir(sys.argv[1]); os.getuid() or os.setuid(65534)\n"
        "try: discover_exports(pathlib.Path('closed'))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    directory.chmod(0o700)

    assert done.stdout.startswith("DatasetError the directory of exports cannot be read: Permission denied")


def export(date: str, name: str = "x", size: int = 1, mtime_ns: int = 1) -> ExportFile:
    return ExportFile(directory=Path(), name=f"{name}_{date}", date=date, size=size, mtime_ns=mtime_ns)


DATES = ["2026-06-01", "2026-06-03", "2026-06-07", "2026-06-09"]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("all", ["2026-06-01", "2026-06-03", "2026-06-07"]),
        ("date", ["2026-06-07"]),
        ("last:1", ["2026-06-07"]),
        ("last:2", ["2026-06-03", "2026-06-07"]),
        ("last:99", ["2026-06-01", "2026-06-03", "2026-06-07"]),
    ],
)
def test_a_window_counts_dates_with_data_up_to_the_datasets_own(window: str, expected: list[str]) -> None:
    files = [export(date) for date in reversed(DATES)]

    assert [file.date for file in window_of(files, "2026-06-07", window)] == expected


def test_a_date_without_exports_has_an_empty_window_of_its_own() -> None:
    assert window_of([export(date) for date in DATES], "2026-06-08", "date") == []


@pytest.mark.parametrize("window", ["", "last:0", "last:-1", "last:x", "ALL", "last: 3"])
def test_an_unknown_window_is_an_error(window: str) -> None:
    with pytest.raises(ConfigurationError, match="last:N"):
        window_of([], "2026-06-07", window)


def test_the_stat_fingerprint_follows_names_sizes_and_times_and_not_the_order() -> None:
    files = [export("2026-06-01"), export("2026-06-02")]

    assert stat_fingerprint(files) == stat_fingerprint(files[::-1])
    changes = [export("2026-06-02", name="y"), export("2026-06-02", size=2), export("2026-06-02", mtime_ns=2)]
    fingerprints = {stat_fingerprint([files[0], change]) for change in changes}
    assert len(fingerprints | {stat_fingerprint(files)}) == 4


def test_the_content_fingerprint_follows_the_bytes_and_not_the_times(tmp_path: Path) -> None:
    path = tmp_path / "brain_dataset_2026-06-01.jsonl"
    path.write_text("a")
    before = content_fingerprint(discover_exports(tmp_path))
    os.utime(path, (1, 1))
    assert content_fingerprint(discover_exports(tmp_path)) == before
    path.write_text("b")
    assert content_fingerprint(discover_exports(tmp_path)) != before


def test_a_link_to_what_is_not_there_is_no_file_that_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "brain_dataset_2026-06-01.jsonl").write_text("a")
    (tmp_path / "brain_dataset_2026-06-02.jsonl").symlink_to(tmp_path / "unmounted" / "export")
    assert list(discovery.list_exports(tmp_path).broken) == ["brain_dataset_2026-06-02.jsonl"]
    with pytest.raises(DatasetError, match="what it links to is not there"):
        discover_exports(tmp_path)


def test_a_file_that_vanished_is_a_passing_error(tmp_path: Path) -> None:
    path = tmp_path / "brain_dataset_2026-06-01.jsonl"
    path.write_text("a")
    files = discover_exports(tmp_path)
    path.unlink()
    with pytest.raises(TransientError, match="vanished"):
        content_fingerprint(files)


@pytest.mark.parametrize("window", ["all", "date", "last:2", "last:9"])
def test_all_windows_at_once_are_the_windows_one_by_one(window: str) -> None:
    # In the order of dates, which is not that of names.
    files = [export(date, name=f"{9 - number}", size=number) for number, date in enumerate([*DATES, DATES[0]])]

    found = window_stats(files[::-1], window)

    assert list(found) == sorted(set(DATES))
    for date, stat in found.items():
        own = window_of(files, date, window)
        assert stat == (stat_fingerprint(own), sum(file.size for file in own))
    assert window_stats([], window) == {}
    with pytest.raises(ConfigurationError, match="last:N"):
        window_stats(files, "yesterday")


def test_windows_of_many_dates_look_at_each_file_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    identity = discovery._identity

    def counting(files: Iterable[ExportFile]) -> bytes:
        chosen = list(files)
        looked_at.append(len(chosen))
        return identity(chosen)

    monkeypatch.setattr(discovery, "_identity", counting)
    days = [f"20{year}-01-{day:02}" for year in range(10, 60) for day in range(1, 21)]
    assert len(window_stats([export(day) for day in days], "all")) == 1000
    assert sum(looked_at) == 1000
