"""Which of the queued runs goes first: what just arrived before the nightly catch-up, that before backfills.

Within each of them the newest dataset date goes first. Dagster's queue takes the run with the largest number
in its tag ``dagster/priority``; on one machine `lora_assets.run_queue` tags the runs of backfills too.
"""

from datetime import date
from typing import Literal

Origin = Literal["backfill", "schedule", "arrival"]

PRIORITY_TAG = "dagster/priority"
# More than there are days in the years of dataset dates, 2000 to 2099.
_STEP = 100_000
_RANK: dict[Origin, int] = {"backfill": 0, "schedule": 1, "arrival": 2}


def priority_tags(origin: Origin, dataset_date: str) -> dict[str, str]:
    """The tag that gives a run its place in the queue.

    Args:
        origin: why the run is asked for.
        dataset_date: its partition, an ISO date.
    """
    days = (date.fromisoformat(dataset_date) - date(2000, 1, 1)).days
    return {PRIORITY_TAG: str(_RANK[origin] * _STEP + days)}
