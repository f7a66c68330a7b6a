"""The run log's tables, version by version; `upgrade` brings a database to the newest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

# Optuna and Dagster keep a table `alembic_version` of their own: one database may serve all three.
VERSION_TABLE = "lora_assets_migrations"
# Any number, as long as no other program locks the same one: "lora" in ASCII.
_ADVISORY_LOCK = 0x6C6F7261


def upgrade(connection: Connection) -> None:
    """Create or upgrade the tables inside the connection's transaction.

    An existing `lora_training_runs`, made by hand, is adopted: its rows are not touched. Processes that
    start together wait for each other under an advisory lock that ends with the transaction.

    Raises:
        ConfigurationError: a table of that name exists with other columns.
    """
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import text

    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    config = Config()
    # ConfigParser reads % as the start of an interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
