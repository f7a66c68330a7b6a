"""`lora-assets migrate`: the tables of the run log, before anything needs them."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_assets.cli.app import app
from resources.postgres import EmbeddedPostgres


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedPostgres]:
    # Outside of pytest's own directory: a socket's path must be short, and PostgreSQL may run as another user.
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as directory:
        server = EmbeddedPostgres(Path(directory))
        monkeypatch.setenv("DATABASE_URL", server.url)
        yield server
        server.close()


def tables(url: str) -> set[str]:
    import sqlalchemy as sa

    engine = sa.create_engine(url, poolclass=sa.NullPool)
    return set(sa.inspect(engine).get_table_names())


def test_an_empty_database_gets_the_tables_and_a_second_time_changes_nothing(server: EmbeddedPostgres) -> None:
    assert tables(server.url) == set()
    first = CliRunner().invoke(app, ["migrate", "--json"])
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout) == {"status": "completed"}
    made = tables(server.url)
    assert {"lora_training_runs", "lora_assets_migrations"} <= made
    assert CliRunner().invoke(app, ["migrate"]).exit_code == 0
    assert tables(server.url) == made


def test_a_database_that_does_not_answer_ends_it_with_the_code_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:very-secret@127.0.0.1:1/db?connect_timeout=1")
    result = CliRunner().invoke(app, ["migrate"])
    assert result.exit_code == 75
    assert "very-secret" not in result.output
