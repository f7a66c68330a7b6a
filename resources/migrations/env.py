"""Run by alembic: migrates over the connection that `upgrade` hands it."""

from __future__ import annotations

from alembic import context  # noqa: TID253 - alembic itself executes this file

from resources.migrations import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
