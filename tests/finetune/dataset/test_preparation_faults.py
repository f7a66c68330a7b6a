"""Disks that fill up, files that change or vanish, processes that are killed: no half result, a clear error."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.dataset.discovery import ExportFile, discover_exports
from finetune.dataset.models import PreparedDataset
from finetune.dataset.prepare import PrepareParameters, load_prepared, prepare_dataset
from finetune.dataset.reading import Fingerprint, fingerprint_file
from finetune.dataset.scan import Limits, RangeTask
from finetune.dataset.workers import scanning
from finetune.errors import DatasetError, StorageFullError, TransientError
from finetune.layout import DataLayout
from finetune.progress import ProgressEvent
from finetune.publishing import is_complete, read_manifest

Prepare = Callable[..., PreparedDataset]
Pairs = Callable[..., bytes]
PARAMETERS = PrepareParameters(eval_fraction=0.5)


@pytest.fixture
def listed(layout: DataLayout, pairs: Pairs) -> list[ExportFile]:
    layout.exports.mkdir(parents=True)
    for day in (1, 2):
        path = layout.exports / f"brain_dataset_2026-06-0{day}.jsonl"
        path.write_bytes(pairs(*range(day * 1000, day * 1000 + 400)))
    return discover_exports(layout.exports)


def published(layout: DataLayout) -> list[Path]:
    root = layout.root / "prepared" / "brain"
    return [path for path in root.glob("*/*") if path.parent.name != ".index"] if root.exists() else []


def prepare_listed(listed: list[ExportFile], layout: DataLayout, **options: object) -> PreparedDataset:
    return prepare_dataset(listed, date="2026-06-02", layout=layout, parameters=PARAMETERS, **options)  # type: ignore[arg-type]


def rewrite_keeping_size_and_time(file: ExportFile) -> None:
    content = file.path.read_bytes()
    file.path.write_bytes(content.replace(b"Answer", b"Forged"))
    os.utime(file.path, ns=(file.mtime_ns, file.mtime_ns))
    status = file.path.stat()
    assert (status.st_size, status.st_mtime_ns) == (file.size, file.mtime_ns)
    assert file.path.read_bytes() != content


def test_a_file_that_grew_since_it_was_listed_is_noticed(listed: list[ExportFile], layout: DataLayout) -> None:
    with listed[0].path.open("ab") as stream:
        stream.write(b'{"text":"more"}\n')
    with pytest.raises(TransientError, match=r"changed while it was read.*2026-06-01"):
        prepare_listed(listed, layout)
    assert not published(layout)
    # Listed anew, it is prepared.
    assert prepare_listed(discover_exports(layout.exports), layout).counts.lines == 801


@pytest.mark.parametrize("longer", [b"", b'{"text":"more"}\n'])
def test_a_change_of_size_or_of_time_alone_is_noticed(
    listed: list[ExportFile], layout: DataLayout, longer: bytes
) -> None:
    file = listed[1]
    # What is known of the files, and made of them, does not make up for a look at them.
    prepare_listed(listed, layout)
    with file.path.open("ab") as stream:
        stream.write(longer)
    os.utime(file.path, ns=(file.mtime_ns, file.mtime_ns + (not longer)))
    status = file.path.stat()
    assert (status.st_size != file.size) != (status.st_mtime_ns != file.mtime_ns)
    with pytest.raises(TransientError, match=r"changed while it was read.*2026-06-02"):
        prepare_listed(listed, layout)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_grows_once_it_was_hashed_is_noticed(
    listed: list[ExportFile], layout: DataLayout, workers: int
) -> None:
    struck = []

    def strike(event: ProgressEvent) -> None:
        if event.stage == "hash" and event.done == event.total:
            with listed[0].path.open("ab") as stream:
                struck.append(stream.write(b'{"text":"more"}\n'))

    with pytest.raises(TransientError, match=r"changed while it was read.*2026-06-01"):
        prepare_listed(listed, layout, workers=workers, on_progress=strike)
    assert struck
    assert not published(layout)


def test_a_file_that_shrank_since_it_was_listed_is_noticed(listed: list[ExportFile], layout: DataLayout) -> None:
    os.truncate(listed[1].path, 10)
    with pytest.raises(TransientError, match="changed while it was read"):
        prepare_listed(listed, layout)


@pytest.mark.parametrize("stage", ["hash", "validate"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_changed_between_two_readings_is_noticed_though_its_size_and_time_are_the_same(
    listed: list[ExportFile], layout: DataLayout, stage: str, workers: int
) -> None:
    struck = []

    def strike(event: ProgressEvent) -> None:
        if event.stage == stage and event.done == event.total and not struck:
            rewrite_keeping_size_and_time(listed[0])
            struck.append(event)

    with pytest.raises(TransientError, match="changed while it was read"):
        prepare_listed(listed, layout, workers=workers, on_progress=strike)
    assert struck
    assert not published(layout)
    # What was read of the other content is not kept under the name of the one that was hashed.
    indexes = list((layout.root / "prepared" / "brain" / ".index").glob("[!.]*"))
    assert len(indexes) == (0 if stage == "hash" else 2)
    assert prepare_listed(listed, layout).counts.kept == 800


def test_a_file_that_vanished_is_a_passing_error(listed: list[ExportFile], layout: DataLayout) -> None:
    listed[0].path.unlink()
    with pytest.raises(TransientError, match=r"vanished.*2026-06-01"):
        prepare_listed(listed, layout)
    assert not published(layout)


def test_a_file_that_cannot_be_read_is_named(listed: list[ExportFile], layout: DataLayout) -> None:
    # Even root cannot read a directory as a file.
    listed[0].path.unlink()
    listed[0].path.mkdir()
    with pytest.raises(DatasetError, match=r"cannot be read: Is a directory.*2026-06-01"):
        prepare_listed(listed, layout)
    assert not published(layout)


def test_a_file_without_read_permission_is_named(listed: list[ExportFile], layout: DataLayout) -> None:
    listed[1].path.chmod(0o000)
    layout.root.chmod(0o777)
    layout.root.parent.chmod(0o755)
    # Root may read everything, so a child gives that up first.
    program = (
        "import os, sys, pathlib; from finetune.dataset.discovery import discover_exports\n"
        "from finetune.dataset.prepare import prepare_dataset; from finetune.layout import DataLayout\n"
        "os.chdir(sys.argv[1]); os.getuid() or os.setuid(65534); layout = DataLayout(pathlib.Path('data'))\n"
        "try: prepare_dataset(discover_exports(layout.exports), date='2026-06-02', layout=layout)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    command = [sys.executable, "-c", program, layout.root.parent]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    listed[1].path.chmod(0o600)

    assert done.stdout.startswith("DatasetError an export cannot be read: Permission denied [data/datasets/brain/")
    assert "2026-06-02.jsonl" in done.stdout
    assert not published(layout)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk]).returncode:
        pytest.skip("a disk that fills up needs the right to mount one")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_named_and_nothing_half_made_stays(small_disk: Path, pairs: Pairs, tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    exports.mkdir()
    (exports / "brain_dataset_2026-06-01.jsonl").write_bytes(pairs(*range(4000)))
    layout = DataLayout(small_disk)

    with pytest.raises(StorageFullError, match=r"no space left.*Free space"):
        prepare_listed(discover_exports(exports), layout)

    assert not published(layout)
    assert not [path for path in small_disk.rglob("*") if path.is_file() and ".tmp-" in str(path)]


def test_a_killed_worker_is_a_passing_error(listed: list[ExportFile]) -> None:
    [task, *_] = tasks(listed[0])
    before = children()
    with scanning(2) as scan:
        workers = children() - before
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        with pytest.raises(TransientError, match="ended early"):
            list(scan([task] * 4))
    assert not children() - before


def tasks(file: ExportFile) -> list[RangeTask]:
    content: Fingerprint = fingerprint_file(file.path, size=file.size, mtime_ns=file.mtime_ns, block_bytes=file.size)
    return [RangeTask(file.path, file.size, 0, file.size, content.blocks[0], Limits(1 << 20, 64))]


def children(of: int | None = None) -> set[int]:
    listing = Path(f"/proc/{of or os.getpid()}/task").glob("*/children")
    return {int(pid) for path in listing for pid in path.read_text().split()}


PROGRAM = """
import sys, pathlib
from finetune.dataset.discovery import discover_exports
from finetune.dataset.prepare import PrepareParameters, prepare_dataset
from finetune.layout import DataLayout
layout = DataLayout(pathlib.Path(sys.argv[1]))
print("ready", flush=True)
prepare_dataset(discover_exports(layout.exports), date="2026-06-02", layout=layout, workers=int(sys.argv[2]),
    range_bytes=1 << 14, parameters=PrepareParameters(eval_fraction=0.5),
    on_progress=lambda event: print(event.stage, flush=True))
"""


def test_a_preparation_killed_at_any_moment_leaves_no_half_and_the_next_one_finishes(
    layout: DataLayout, pairs: Pairs
) -> None:
    layout.exports.mkdir(parents=True)
    for day in (1, 2):
        path = layout.exports / f"brain_dataset_2026-06-0{day}.jsonl"
        path.write_bytes(pairs(*range(day * 100_000, day * 100_000 + 10_000)))
    chance = random.Random(7)
    struck = []
    for attempt in range(6):
        shutil.rmtree(layout.root / "prepared", ignore_errors=True)
        stage = ("ready", "hash", "validate")[attempt % 3]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, layout.root, str(1 + attempt % 2)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        while process.stdout.readline().strip() != stage:
            assert process.poll() is None
        workers = children(process.pid)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            struck.append(stage)
        process.stdout.close()
        for path in published(layout):
            assert path.name.startswith(".") or load_prepared(path).counts.lines == 20_000
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers outlived their parent"

    dataset = prepare_listed(discover_exports(layout.exports), layout)

    assert set(struck) == {"ready", "hash", "validate"}
    assert dataset.counts.kept == 20_000
    assert is_complete(dataset.path)


FORKS = """
import os, pathlib, sys
from finetune.dataset.discovery import discover_exports
from finetune.dataset.prepare import PrepareParameters, prepare_dataset
from finetune.layout import DataLayout
layout = DataLayout(pathlib.Path(sys.argv[1]))
for _ in sys.stdin:
    child = os.fork()
    if not child:
        prepare_dataset(discover_exports(layout.exports), date="2026-06-02", layout=layout, range_bytes=1 << 14,
            parameters=PrepareParameters(eval_fraction=0.5, near_duplicates="report", window="last:2"))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_kill_at_any_of_twenty_random_moments_leaves_the_old_dataset_and_the_new_one_whole_or_not_at_all(
    layout: DataLayout, pairs: Pairs
) -> None:
    layout.exports.mkdir(parents=True)
    for day in (1, 2):
        path = layout.exports / f"brain_dataset_2026-06-0{day}.jsonl"
        path.write_bytes(pairs(*range(day * 10_000, day * 10_000 + 400)))
    old = prepare_dataset(discover_exports(layout.exports), date="2026-06-01", layout=layout, parameters=PARAMETERS)
    root = layout.root / "prepared" / "brain"
    chance = random.Random(8)
    with subprocess.Popen(
        [sys.executable, "-c", FORKS, layout.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def attempt(seconds: float | None) -> int:
            """The exit status of a preparation from scratch, killed after so many seconds."""
            shutil.rmtree(root / "2026-06-02", ignore_errors=True)
            shutil.rmtree(root / ".index", ignore_errors=True)
            print(file=process.stdin, flush=True)
            child = int(process.stdout.readline())  # type: ignore[union-attr]
            if seconds is not None:
                time.sleep(seconds)
                # Nobody but its parent collects it, which is told only below: the number is still its own.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            return int(process.stdout.readline())  # type: ignore[union-attr]

        started = time.monotonic()
        assert attempt(None) == 0
        duration = time.monotonic() - started
        [expected] = (root / "2026-06-02").iterdir()
        contents = {path.name: path.read_bytes() for path in expected.glob("*.jsonl")}
        killed = 0
        for _ in range(60):
            killed += attempt(chance.uniform(0, duration)) == -signal.SIGKILL
            read_manifest(old.path, verify="hashes")
            for path in (root / "2026-06-02").glob("[!.]*") if (root / "2026-06-02").exists() else ():
                read_manifest(path, verify="hashes")
                assert {each.name: each.read_bytes() for each in path.glob("*.jsonl")} == contents
            if killed == 20:
                break
        assert killed == 20
        # What the last one left behind is gone on with.
        found = discover_exports(layout.exports)
        parameters = PARAMETERS.model_copy(update={"near_duplicates": "report", "window": "last:2"})
        after = prepare_dataset(found, date="2026-06-02", layout=layout, parameters=parameters)
        assert {path.name: path.read_bytes() for path in after.path.glob("*.jsonl")} == contents
        process.stdin.close()
