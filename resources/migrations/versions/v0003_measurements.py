"""Beside each training run: what it really took, for the next plan's estimates.

Revision ID: 0003
"""

from __future__ import annotations

from alembic import op  # noqa: TID253 - executed by alembic alone

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table beside the runs."""
    op.execute(
        """
        CREATE TABLE lora_training_run_measurements (
            id                  BIGINT PRIMARY KEY REFERENCES lora_training_runs (id) ON DELETE CASCADE,
            method              TEXT NOT NULL,
            device              TEXT NOT NULL,
            estimated_memory_gb DOUBLE PRECISION,
            peak_memory_gb      DOUBLE PRECISION,
            tokens_per_second   DOUBLE PRECISION
        )
        """
    )


def downgrade() -> None:
    """Drop it; the runs themselves stay."""
    op.execute("DROP TABLE lora_training_run_measurements")
