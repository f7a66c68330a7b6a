"""Dataset preparation, side by side with what else one would use.

    python benchmarks/dataset/bench.py [--megabytes 100 1000 5000] [--rounds 5] [--only ours "orjson loop"]

Every round runs every contender once in a fresh process, so that noise meets them alike; the figures are
medians. CPU time counts all processes, memory is the peak of their resident sizes added up (pages that two
processes share count twice). Our figures hold hashing, validation, the index, and files flushed to the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from contenders import CONTENDERS, NEEDS_CLEAN, SAME_FILES, UP_TO_MEGABYTES  # noqa: E402
from generator import write_exports  # noqa: E402

from finetune.publishing import sha256_file  # noqa: E402

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Measurement(NamedTuple):
    """One run: seconds of CPU and wall, peak bytes of memory, the hashes of the two files it made."""

    cpu: float
    wall: float
    memory: int
    digests: list[str]


def measure(name: str, source: Path, target: Path) -> Measurement:
    """Run one contender in a fresh process."""
    target.mkdir()
    before = os.times()
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "contenders.py"), name, str(source), str(target)],
        # (Threads of numpy's BLAS spin when they start, though nobody asks them for anything.)
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    peaks, ended = [0], threading.Event()

    def watch() -> None:
        # (Every hundredth of a second this would take a tenth of a core from who is measured.)
        while not ended.wait(0.05):
            peaks.append(_resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    wall = time.perf_counter() - started
    ended.set()
    watcher.join()
    after = os.times()
    if process.returncode:
        raise SystemExit(f"{name} failed with exit status {process.returncode}")
    digests = [sha256_file(next(target.rglob(f"{side}.jsonl"))) for side in ("train", "eval")]
    shutil.rmtree(target)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measurement(cpu, wall, max(peaks), digests)


def _resident(pid: int) -> int:
    """Resident bytes of a process and all its descendants."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * _PAGE + sum(map(_resident, children))


def main() -> None:
    """Print one table a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    options = parser.parse_args()
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as directory:
            names = [name for name in options.only if megabytes <= UP_TO_MEGABYTES.get(name, megabytes)]
            compare(Path(directory), megabytes, options.rounds, names)


def compare(directory: Path, megabytes: int, rounds: int, names: list[str]) -> None:
    """Measure the contenders on one size and print the table."""
    corpora = {clean: directory / ("clean" if clean else "dirty") for clean in {name in NEEDS_CLEAN for name in names}}
    for clean, source in corpora.items():
        write_exports(source, megabytes * 10**6, clean=clean)
    runs: dict[str, list[Measurement]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            runs[name].append(measure(name, corpora[name in NEEDS_CLEAN], directory / "target"))
    if len({str(run.digests) for name in SAME_FILES & set(names) for run in runs[name]}) > 1:
        raise SystemExit(f"the files of {', '.join(sorted(SAME_FILES))} differ")
    print(f"\n{megabytes} MB, medians of {rounds}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| | MB per CPU-second | wall s | MB/s | peak MB | ours: by CPU | by wall |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    figures = {name: list(map(statistics.median, list(zip(*runs[name], strict=True))[:3])) for name in names}
    for name, (cpu, wall, memory) in figures.items():
        ratios = [theirs / ours for theirs, ours in zip((cpu, wall), figures["ours"], strict=False)]
        faster = " | ".join(f"{ratio:.2f} x" for ratio in ratios)
        print(
            f"| {name} | {megabytes / cpu:.0f} | {wall:.2f} | {megabytes / wall:.0f} | {memory / 1e6:.0f} | {faster} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
