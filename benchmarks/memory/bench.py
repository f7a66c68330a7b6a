"""Estimated peaks of training beside published measurements, line by line.

    python -m benchmarks.memory.bench [--quiet]

``measured.csv`` holds 118 measurements by litgpt and torchtune, with their sources; 15 of them ran out of memory.
``held_out.csv`` holds others that no constant was chosen by. The models are their public ``config.json``, without
weights. Exit code 1 if, on at least 85 lines of the first table, the mean absolute error is 12 % or more, or one is
beyond 30 %, or a line that ran out of memory is estimated to fit.
"""

from __future__ import annotations

import argparse
import sys
from statistics import mean

from benchmarks.memory import held_out, litgpt, torchtune
from benchmarks.memory.rows import Row, read_table

LEAST_ROWS, MEAN_ERROR, WORST_ERROR = 85, 0.12, 0.30


def measured_rows() -> list[Row]:
    """All lines of ``measured.csv``."""
    return [
        (torchtune if "torchtune" in line["source"] else litgpt).row_of(line) for line in read_table("measured.csv")
    ]


def held_out_rows() -> list[Row]:
    """All lines of ``held_out.csv``."""
    return [held_out.row_of(line) for line in read_table("held_out.csv")]


def main() -> None:
    """Print the tables; exit with 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="the summary alone")
    quiet = parser.parse_args().quiet
    rows, others = measured_rows(), held_out_rows()
    if not quiet:
        _print(rows)
        _print(others)
    numeric = [row for row in rows if row.measured is not None]
    counted = [row for row in numeric if not row.reason]
    ran_out = [row for row in rows if row.measured is None]
    errors = [abs(row.error) for row in counted]
    refused = sum(row.limit_gb is not None and row.needed_gb > row.limit_gb for row in ran_out)
    print(
        f"measured.csv: {len(counted)} of {len(numeric)} lines counted, mean absolute error {mean(errors):.1%}, "
        f"worst {max(errors):.1%}; {refused} of {len(ran_out)} that ran out of memory estimated not to fit"
    )
    for name in ("huggingface/peft", "QwenLM", "docs.unsloth"):
        table = [abs(row.error) for row in others if row.source.startswith(name)]
        print(f"held out, {name}: {len(table)} lines, mean absolute error {mean(table):.1%}, worst {max(table):.1%}")
    good = len(counted) >= LEAST_ROWS and mean(errors) < MEAN_ERROR and max(errors) <= WORST_ERROR
    sys.exit(not (good and refused == len(ran_out)))


def _print(rows: list[Row]) -> None:
    print(f"{'':<86} {'measured':>8} {'estimate':>8} {'error':>7}")
    for row in rows:
        if row.measured is None:
            fits = "would fit" if row.limit_gb is None or row.needed_gb <= row.limit_gb else "does not fit"
            print(f"{row.name[:86]:<86} {'OOM':>8} {row.needed_gb:>8.2f}         {fits} in {row.limit_gb} GB")
        else:
            note = f"  left out: {row.reason}" if row.reason else ""
            print(f"{row.name[:86]:<86} {row.measured:>8.2f} {row.estimated:>8.2f} {row.error:>+7.1%}{note}")
    print()


if __name__ == "__main__":
    main()
