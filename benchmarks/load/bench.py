"""How long the code location takes to load, against importing Dagster alone.

    python benchmarks/load/bench.py [--rounds 7]

Each round starts a fresh interpreter for both, one after the other, so that noise meets them alike. The
medians' ratio must stay at or below 2; where dagster_k8s is configured, importing it counts on both sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

MEASURE = """
import time, resource
started = time.perf_counter()
{statement}
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
CASES = {
    "local": ({}, "import dagster", "import lora_assets.definitions"),
    "kubernetes": (
        {
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            "BASE_MODEL_NAME": "llama3-8b",
            "DATABASE_URL": "postgresql://bench@127.0.0.1/bench",
        },
        "import dagster, dagster_k8s",
        "import lora_assets.definitions",
    ),
}


def measure(statement: str, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds and peak MB of one fresh interpreter."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURE.format(statement=statement)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return float(out[0]), float(out[1])


def main() -> None:
    """Print the table; exit with 1 if a ratio is above 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"{'case':<12} {'dagster s':>10} {'MB':>6} {'lora-assets s':>14} {'MB':>6} {'ratio':>6}")
    worst = 0.0
    for case, (environment, baseline, ours) in CASES.items():
        pairs = [(measure(baseline, environment), measure(ours, environment)) for _ in range(rounds)]
        base_s, base_mb = (statistics.median(pair[0][i] for pair in pairs) for i in (0, 1))
        our_s, our_mb = (statistics.median(pair[1][i] for pair in pairs) for i in (0, 1))
        worst = max(worst, our_s / base_s)
        print(f"{case:<12} {base_s:>10.2f} {base_mb:>6.0f} {our_s:>14.2f} {our_mb:>6.0f} {our_s / base_s:>6.2f}")
    sys.exit(worst > 2)


if __name__ == "__main__":
    main()
