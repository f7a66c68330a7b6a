"""The table of training runs, created, or adopted where somebody made it by hand.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa  # noqa: TID253 - executed by alembic alone
from alembic import op  # noqa: TID253 - executed by alembic alone

from finetune.errors import ConfigurationError

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TABLE = """
CREATE TABLE IF NOT EXISTS lora_training_runs (
    id              BIGSERIAL PRIMARY KEY,
    dataset_paths   TEXT[] NOT NULL,
    base_model      TEXT NOT NULL,
    adapter_path    TEXT,
    backend         TEXT NOT NULL DEFAULT 'hf-peft',    -- 'hf-peft' | 'h2o'
    external_run_id TEXT,                               -- the experiment's id in H2O
    metrics         JSONB NOT NULL DEFAULT '{}'::jsonb, -- loss, accuracy, ...
    status          TEXT NOT NULL,                      -- 'RUNNING', 'COMPLETED', 'FAILED'
    error_message   TEXT,
    started_at      TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    finished_at     TIMESTAMPTZ,
    created_at      TIMESTAMPTZ NOT NULL DEFAULT NOW()
)
"""
_COLUMNS = {
    "id": "bigint",
    "dataset_paths": "text[]",
    "base_model": "text",
    "adapter_path": "text",
    "backend": "text",
    "external_run_id": "text",
    "metrics": "jsonb",
    "status": "text",
    "error_message": "text",
    "started_at": "timestamp with time zone",
    "finished_at": "timestamp with time zone",
    "created_at": "timestamp with time zone",
}


def upgrade() -> None:
    """Create the table, or check that the existing one has the same columns."""
    connection = op.get_bind()
    # exec_driver_sql, since text() would take the cast's colons for a parameter.
    connection.exec_driver_sql(_TABLE)
    rows = connection.execute(
        sa.text(
            "SELECT attname::text AS name, format_type(atttypid, atttypmod) AS kind FROM pg_attribute "
            "WHERE attrelid = to_regclass('lora_training_runs') AND attnum > 0 AND NOT attisdropped"
        )
    )
    found = {row.name: row.kind for row in rows}
    differences = [
        f"{name} is {found.get(name, 'missing')} instead of {kind}"
        for name, kind in _COLUMNS.items()
        if found.get(name) != kind
    ]
    if differences:
        raise ConfigurationError(
            f"the existing table has other columns: {'; '.join(differences)}",
            where="lora_training_runs",
            remedy="Rename that table, or point DATABASE_URL at another database",
        )


def downgrade() -> None:
    """Refuse: the table may be older than this program."""
    raise ConfigurationError(
        "the first version has nothing to go back to",
        where="lora_training_runs",
        remedy="Drop the table by hand if its rows may go",
    )
