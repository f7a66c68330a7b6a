"""Who may train: one row per training, whose token grows with every process that takes it.

Revision ID: 0004
"""

from __future__ import annotations

from alembic import op  # noqa: TID253 - executed by alembic alone

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.execute(
        """
        CREATE TABLE lora_training_leases (
            training_run_id TEXT PRIMARY KEY,
            token           BIGINT NOT NULL,
            holder          TEXT NOT NULL,
            process         TEXT NOT NULL,
            expires_at      TIMESTAMPTZ NOT NULL
        )
        """
    )


def downgrade() -> None:
    """Drop it; trainings that run meanwhile end as if they had lost their lease."""
    op.execute("DROP TABLE lora_training_leases")
