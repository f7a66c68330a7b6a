"""Rows of the run log that nobody works on any more, though they say RUNNING."""

from collections.abc import Callable, Mapping
from typing import Any

from resources.database import Transaction
from resources.lease import LEASE_SECONDS

# A live process renews its lease three times before it is over; one that was paused, or whose database was away,
# gets as long again.
ABANDONED_SECONDS = LEASE_SECONDS

_RUNNING = """
    SELECT run.id, detail.dagster_run_id, detail.host
    FROM lora_training_runs AS run JOIN lora_training_run_details AS detail USING (id)
    WHERE run.status = 'RUNNING' AND
"""
_CLOSE = """
    UPDATE lora_training_runs AS run SET status = 'FAILED', error_message = :reason, finished_at = NOW()
    FROM lora_training_run_details AS detail
    WHERE run.id = :id AND detail.id = run.id AND run.status = 'RUNNING' AND
"""
_OF_A_RUN = "detail.dagster_run_id = :dagster_run_id RETURNING run.id"
_UNLEASED = """
    EXISTS (
        SELECT 1 FROM lora_training_leases AS lease WHERE lease.training_run_id = detail.training_run_id
        AND lease.expires_at <= clock_timestamp() - make_interval(secs => :seconds)
    )
"""


def close_of_runs(transaction: Transaction, is_over: Callable[[str], str | None]) -> list[int]:
    """Mark FAILED the RUNNING rows whose Dagster run is over, by `is_over`'s reason; returns their ids."""
    with transaction() as execute:
        running = execute(_RUNNING + "detail.dagster_run_id IS NOT NULL ORDER BY run.id", {})
    reasons = ((row, is_over(row["dagster_run_id"])) for row in running)
    # A retry may have taken the row over since it was read.
    return [row["id"] for row, reason in reasons if reason and _close(transaction, _OF_A_RUN, row, reason)]


def close_unleased(transaction: Transaction, seconds: float) -> list[int]:
    """Mark FAILED the RUNNING rows whose training's lease has been over for `seconds`; returns their ids."""
    with transaction() as execute:
        running = execute(_RUNNING + _UNLEASED + " ORDER BY run.id", {"seconds": seconds})
    condition = _UNLEASED + " RETURNING run.id"
    return [
        row["id"]
        for row in running
        if _close(
            transaction,
            condition,
            {**row, "seconds": seconds},
            f"its process on {row['host']} was killed, or could not reach the database: "
            "nobody has renewed the training's lease",
        )
    ]


def _close(transaction: Transaction, condition: str, row: Mapping[str, Any], reason: str) -> bool:
    # PostgreSQL's TEXT holds no NUL.
    with transaction() as execute:
        return bool(execute(_CLOSE + condition, {**row, "reason": reason.replace("\x00", "\\x00")}))
