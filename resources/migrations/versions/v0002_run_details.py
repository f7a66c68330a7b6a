"""Beside each training run: which Dagster run and which attempt it belongs to.

Revision ID: 0002
"""

from __future__ import annotations

from alembic import op  # noqa: TID253 - executed by alembic alone

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table beside the runs."""
    op.execute(
        """
        CREATE TABLE lora_training_run_details (
            id                  BIGINT PRIMARY KEY REFERENCES lora_training_runs (id) ON DELETE CASCADE,
            training_run_id     TEXT NOT NULL,
            dataset_date        TEXT,
            dagster_run_id      TEXT,
            dagster_root_run_id TEXT NOT NULL DEFAULT '',
            attempts            INTEGER NOT NULL DEFAULT 1,
            host                TEXT NOT NULL,
            pid                 INTEGER NOT NULL,
            external_run_url    TEXT
        )
        """
    )
    op.execute(
        "CREATE INDEX lora_training_run_details_chain "
        "ON lora_training_run_details (training_run_id, dagster_root_run_id)"
    )


def downgrade() -> None:
    """Drop it; the runs themselves stay."""
    op.execute("DROP TABLE lora_training_run_details")
