"""How long a tick of the arrival sensor takes on a directory of 100,000 exports, and how large its cursor grows.

    python benchmarks/sensor/bench.py [--files 100000] [--dates 4000]

Ticks of the real sensor on an instance of Dagster on SQLite: the first on a directory that it never saw, the
second (which asks for the first runs), one where every date is known, one after each file was touched, and one
with a marker beside every file. A tick must take less than 2 seconds, the cursor less than 64 KB.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path

import dagster as dg

from finetune.dataset.discovery import DONE, list_exports
from sensors.arrivals import Cursor, decide
from sensors.export_arrival import build_export_arrival_sensor

LIMIT = 20
MOST_SECONDS, MOST_BYTES = 2.0, 64_000


def fill(directory: Path, files: int, dates: int) -> None:
    """Empty exports, spread over the dates; what is in them is never looked at."""
    first = date(2015, 1, 1)
    for number in range(files):
        day = first + timedelta(days=number % dates)
        (directory / f"brain_dataset_{day}_{number:06d}.jsonl").touch()


def settled(directory: Path, cursor: str) -> str:
    """The cursor after so many ticks that every date was asked for."""
    listing = list_exports(directory)
    state = Cursor.decode(cursor)
    while (decision := decide(state, listing, complete="still", limit=200)).ready or decision.waiting:
        state = decision.cursor
    return state.encode()


def main() -> None:
    """Print the table; exit with 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--dates", type=int, default=4000)
    arguments = parser.parse_args()
    logging.disable()
    broken = False
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as exports:
        directory = Path(exports)
        fill(directory, arguments.files, arguments.dates)
        sensor = build_export_arrival_sensor(
            job_name="make",
            partitions=dg.DynamicPartitionsDefinition(name="dates"),
            exports=dg.AssetKey("exports"),
            directory=directory,
            pattern="brain_dataset_*.jsonl",
            complete="still",
            interval_seconds=30,
            limit=LIMIT,
            running=False,
        )
        print(f"{'tick':<28} {'wall s':>7} {'CPU s':>7} {'runs':>5} {'cursor bytes':>13}")

        def tick(name: str, cursor: str | None) -> str:
            nonlocal broken
            with dg.DagsterInstance.local_temp(home) as instance:
                context = dg.build_sensor_context(instance=instance, cursor=cursor)
                wall, cpu = time.perf_counter(), time.process_time()
                result = sensor(context)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if not isinstance(result, dg.SensorResult):
                raise TypeError(f"the sensor skipped: {result}")
            after = result.cursor or ""
            print(f"{name:<28} {wall:>7.2f} {cpu:>7.2f} {len(result.run_requests or []):>5} {len(after):>13}")
            # Other programs on the machine take wall time, and none of the tick's own.
            broken |= cpu > MOST_SECONDS or len(after) > MOST_BYTES
            return after

        first = tick("all files new", None)
        second = tick("all files stood still", first)
        known = tick("every date known", settled(directory, second))
        for entry in os.scandir(directory):
            os.utime(entry.path, ns=(1, time.time_ns()))
        tick("all files changed", known)
        for entry in list(os.scandir(directory)):
            Path(entry.path + DONE).touch()
        tick("a marker beside every file", known)
    sys.exit(broken)


if __name__ == "__main__":
    main()
