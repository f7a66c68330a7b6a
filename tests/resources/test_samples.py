"""The loop's table as an export: exactly the rows of the range, whole or not at all, without a change where none is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from typer.testing import CliRunner
from xxhash import xxh3_64_intdigest

from finetune.dataset.discovery import date_in_name
from finetune.dataset.scan import DEFAULT_LIMITS, RangeTask, scan_range
from finetune.errors import ConfigurationError, DatasetError, RemoteError
from finetune.progress import ProgressEvent
from lora_assets.cli.app import app
from resources.samples import SamplesExport, SamplesTable, export_name, export_samples

TABLE = """
CREATE TABLE brain_training_samples (
    id bigserial PRIMARY KEY, question text, answer text, extra jsonb, rating numeric, blob bytea,
    created_at timestamptz NOT NULL, local_time timestamp
)
"""
COLUMNS = {"id": "id", "instruction": "question", "output": "answer", "meta": "extra", "quality": "rating"}
SINCE, UNTIL = datetime(2026, 6, 1, tzinfo=UTC), datetime(2026, 6, 2, tzinfo=UTC)

Export = Callable[..., SamplesExport]
Execute = Callable[..., None]


@pytest.fixture
def execute(database: str) -> Execute:
    def run(statement: str, *parameters: Any) -> None:
        connection = psycopg2.connect(database)
        with connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters)
        connection.close()

    run(TABLE)
    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "exports" / "brain_dataset_2026-06-01_samples.jsonl"


@pytest.fixture
def export(database: str, execute: Execute, path: Path) -> Export:
    def run(**changed: Any) -> SamplesExport:
        table = SamplesTable(**{"columns": COLUMNS, **changed.pop("table", {})})
        return export_samples(database, path, table, **{"since": SINCE, "until": UNTIL, **changed})

    return run


def insert(execute: Execute, *moments: str) -> None:
    for number, moment in enumerate(moments):
        execute(
            "INSERT INTO brain_training_samples (question, answer, created_at, local_time) VALUES (%s, %s, %s, %s)",
            f"Питання {number}",
            "line\nbreak",
            moment,
            moment,
        )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def leftovers(path: Path) -> list[Path]:
    return [each for each in path.parent.iterdir() if each != path]


def test_the_rows_of_the_range_are_written_oldest_first_with_their_fields_renamed(
    export: Export, execute: Execute, path: Path
) -> None:
    insert(execute, "2026-06-01T23:59:59Z", "2026-06-02T00:00:00Z", "2026-05-31T23:59:59Z", "2026-06-01T00:00:00Z")
    execute('UPDATE brain_training_samples SET extra = \'{"lang": "uk", "n": [1]}\', rating = 0.75 WHERE id = 4')

    result = export()

    assert (result.path, result.rows, result.changed) == (path, 2, True)
    assert read(path) == [
        {
            "id": 4,
            "instruction": "Питання 3",
            "output": "line\nbreak",
            "meta": {"lang": "uk", "n": [1]},
            "quality": 0.75,
        },
        {"id": 1, "instruction": "Питання 0", "output": "line\nbreak"},
    ]
    assert "Питання" in path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o777 == 0o644
    assert not leftovers(path)


def test_times_without_a_zone_are_utc(export: Export, execute: Execute, path: Path) -> None:
    insert(execute, "2026-06-01T00:00:00", "2026-06-02T00:00:00")
    assert export(table={"time_column": "local_time"}).rows == 1
    assert export(table={"time_column": "local_time", "columns": {"at": "local_time"}}).rows == 1
    assert read(path) == [{"at": "2026-06-01T00:00:00"}]


def test_the_same_rows_leave_the_file_as_it_is_and_others_replace_it(
    export: Export, execute: Execute, path: Path
) -> None:
    insert(execute, *["2026-06-01T12:00:00Z"] * 5)
    export()
    os.utime(path, ns=(1, 1))

    assert not export().changed
    assert path.stat().st_mtime_ns == 1

    execute("DELETE FROM brain_training_samples WHERE id = 2")
    assert export().changed
    assert [row["id"] for row in read(path)] == [1, 3, 4, 5]
    # What was deleted in the loop must not stay here.
    execute("DELETE FROM brain_training_samples")
    assert export().changed
    assert path.read_bytes() == b""


def test_rows_of_one_moment_come_in_one_order_however_they_lie_in_the_table(
    export: Export, execute: Execute, path: Path
) -> None:
    insert(execute, *["2026-06-01T12:00:00Z"] * 4)
    export()
    before = path.read_bytes()
    # An update moves a row to the table's end.
    execute("UPDATE brain_training_samples SET answer = answer WHERE id = 1")
    assert not export().changed
    assert path.read_bytes() == before


def test_no_rows_make_no_file(export: Export, path: Path) -> None:
    result = export()
    assert (result.path, result.rows, result.changed) == (None, 0, False)
    assert not path.exists()


def test_rows_come_in_portions_through_a_cursor_on_the_server(
    export: Export, execute: Execute, path: Path, database: str
) -> None:
    execute(
        "INSERT INTO brain_training_samples (question, answer, created_at) "
        "SELECT 'q' || n, repeat('a', 100), '2026-06-01T00:00:00Z' FROM generate_series(1, 6000) AS n"
    )
    cursors: list[str] = []

    def look(event: ProgressEvent) -> None:
        connection = psycopg2.connect(database)
        with connection.cursor() as cursor:
            cursor.execute("SELECT query FROM pg_stat_activity WHERE application_name = 'lora-assets'")
            cursors.extend(query for (query,) in cursor.fetchall())
        connection.close()

    assert export(on_progress=look).rows == 6000
    assert len(read(path)) == 6000
    assert any(query.startswith("FETCH FORWARD") for query in cursors)


def test_an_export_that_breaks_off_leaves_the_old_file_and_nothing_beside_it(
    export: Export, execute: Execute, path: Path, database: str
) -> None:
    insert(execute, "2026-06-01T12:00:00Z")
    export()
    before = path.read_bytes()
    execute(
        "INSERT INTO brain_training_samples (question, answer, created_at) "
        "SELECT 'q' || n, repeat('a', 100), '2026-06-01T00:00:00Z' FROM generate_series(1, 20000) AS n"
    )
    struck = []

    def strike(event: ProgressEvent) -> None:
        if not struck:
            struck.append(event)
            execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'lora-assets'")

    with pytest.raises(RemoteError, match="samples' database does not answer"):
        export(on_progress=strike)

    assert struck
    assert path.read_bytes() == before
    assert not leftovers(path)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"name": "other"}, "no table other.*SAMPLES_TABLE"),
        ({"name": "elsewhere.brain_training_samples"}, "no table elsewhere"),
        ({"columns": {"instruction": "prompt"}}, r"no column prompt.*SAMPLES_COLUMNS.*It has answer, blob, created_at"),
        ({"time_column": "made_at"}, "no column made_at.*SAMPLES_TIME_COLUMN"),
        ({"time_column": "question"}, "refuses the query.*SAMPLES_TIME_COLUMN"),
    ],
)
def test_a_table_or_column_that_is_not_there_is_named_with_its_setting(
    export: Export, path: Path, table: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        export(table=table)
    assert not leftovers(path)


def test_a_schema_may_stand_before_the_table(export: Export, execute: Execute) -> None:
    insert(execute, "2026-06-01T12:00:00Z")
    assert export(table={"name": "public.brain_training_samples"}).rows == 1


def test_a_value_that_json_cannot_hold_is_an_error(export: Export, execute: Execute, path: Path) -> None:
    execute("INSERT INTO brain_training_samples (blob, created_at) VALUES ('x', '2026-06-01T12:00:00Z')")
    with pytest.raises(DatasetError, match="JSON cannot hold"):
        export(table={"columns": {"text": "blob"}})
    assert not path.exists()


def test_half_of_a_surrogate_pair_spoils_its_own_row_alone(export: Export, execute: Execute, path: Path) -> None:
    execute("ALTER TABLE brain_training_samples ADD COLUMN raw json")
    insert(execute, "2026-06-01T12:00:00Z", "2026-06-01T12:00:01Z")
    execute('UPDATE brain_training_samples SET raw = \'{"a": "\\ud800"}\' WHERE id = 1')
    assert export(table={"columns": {**COLUMNS, "raw": "raw"}}).rows == 2

    assert path.read_bytes().count(b"\\ud800") == 1
    data = path.read_bytes()
    found = scan_range(RangeTask(path, len(data), 0, len(data), xxh3_64_intdigest(data), DEFAULT_LIMITS))
    assert (found.lines, found.reasons) == (2, {"lone_surrogate": 1})


def test_what_a_killed_export_left_is_removed_a_day_later(export: Export, execute: Execute, path: Path) -> None:
    insert(execute, "2026-06-01T12:00:00Z")
    path.parent.mkdir(parents=True)
    old, young = (path.with_name(f".{path.name}.tmp-{number}-ab") for number in (1, 2))
    for each in (old, young):
        each.touch()
    os.utime(old, (1, 1))
    export()
    assert leftovers(path) == [young]


def test_a_time_that_python_does_not_know_is_an_error(export: Export, execute: Execute, path: Path) -> None:
    insert(execute, "2026-06-01T12:00:00Z")
    execute("UPDATE brain_training_samples SET local_time = '0044-03-15 BC'")
    with pytest.raises(DatasetError, match="cannot be read: year -44"):
        export(table={"columns": {**COLUMNS, "at": "local_time"}})
    assert not leftovers(path)


def test_an_empty_range_and_a_server_that_is_not_there_are_clear_errors(tmp_path: Path, export: Export) -> None:
    with pytest.raises(ConfigurationError, match="nothing lies between"):
        export(until=SINCE)
    table = SamplesTable(columns=COLUMNS)
    with pytest.raises(RemoteError) as error:
        export_samples("postgresql://me:hidden@127.0.0.1:9/x", tmp_path / "f", table, since=SINCE, until=UNTIL)
    assert "SAMPLES_DATABASE_URL" in str(error.value)
    assert "hidden" not in str(error.value)
    with pytest.raises(ConfigurationError, match="not the URL of a PostgreSQL server"):
        export_samples("mysql://x", tmp_path / "f", table, since=SINCE, until=UNTIL)


def test_a_files_date_is_the_last_day_of_its_range_and_another_range_has_another_name() -> None:
    name = export_name("brain", SINCE, UNTIL)
    assert name == "brain_dataset_2026-06-01_samples_20260601T000000Z_20260602T000000Z.jsonl"
    assert date_in_name(name) == "2026-06-01"
    assert date_in_name(export_name("brain", SINCE, datetime(2026, 6, 2, 0, 1, tzinfo=UTC))) == "2026-06-02"


def test_the_command_puts_the_file_among_the_exports(
    database: str, execute: Execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(execute, "2026-06-01T12:00:00Z", "2026-06-02T12:00:00Z")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("SAMPLES_DATABASE_URL", database)
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:9/none")
    monkeypatch.setenv("SAMPLES_COLUMNS", "id=id, instruction=question, output=answer")
    arguments = ["export-samples", "--since", "2026-06-01", "--until", "2026-06-02T00:00:00+0000", "--json"]

    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 0, done.output
    [file] = (tmp_path / "data" / "datasets" / "brain").iterdir()
    assert json.loads(done.stdout) == {
        "path": str(file),
        "rows": 1,
        "since": "2026-06-01T00:00:00Z",
        "until": "2026-06-02T00:00:00Z",
        "changed": True,
    }
    assert read(file) == [{"id": 1, "instruction": "Питання 0", "output": "line\nbreak"}]
    monkeypatch.setenv("EXPORTS_PATTERN", "other_*.jsonl")
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "no export is looked for under the name" in refused.output
