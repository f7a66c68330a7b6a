"""Exports for loops that write no files yet: rows of the loop's own PostgreSQL table as a dated JSONL file."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from finetune.errors import ConfigurationError, DatasetError, RemoteError, full_disk_named
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import remove_abandoned, sha256_file, temporary_sibling

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Select

_ROWS_AT_A_TIME = 2000


class SamplesTable(BaseModel):
    """Where the samples are: `columns` maps a record's fields to the table's columns.

    `name` may have a schema before it; `time_column` says when a sample was made.
    """

    model_config = ConfigDict(frozen=True)

    name: str = "brain_training_samples"
    columns: dict[str, str]
    time_column: str = "created_at"


class SamplesExport(BaseModel):
    """A written file, or none where there were no rows; `changed` is false if it was there just so."""

    model_config = ConfigDict(frozen=True)

    path: Path | None
    rows: int
    since: datetime
    until: datetime
    changed: bool


def export_name(pipeline: str, since: datetime, until: datetime) -> str:
    """The file's name: its date is the last day of the range, and another range has another name."""
    last = (until - timedelta(microseconds=1)).astimezone(UTC)
    first, end = (f"{moment.astimezone(UTC):%Y%m%dT%H%M%SZ}" for moment in (since, until))
    return f"{pipeline}_dataset_{last:%Y-%m-%d}_samples_{first}_{end}.jsonl"


def export_samples(
    url: str,
    path: Path,
    table: SamplesTable,
    *,
    since: datetime,
    until: datetime,
    on_progress: Progress = ignore_progress,
) -> SamplesExport:
    """Write the rows of ``[since, until)``, oldest first, one record a line; empty columns are left out.

    Rows come through a server-side cursor, so memory does not grow with them. The file appears whole or not
    at all, and the same rows give the same bytes, which leave a file as it is.

    Args:
        url: the PostgreSQL server's.
        path: the file to write.
        table: the table and its columns.
        since: first moment, with its time zone.
        until: the moment after the last.
        on_progress: is told of rows written.

    Raises:
        ConfigurationError: the URL is none of PostgreSQL's, or there is no such table or column.
        DatasetError: a value cannot be read, or not be written as JSON.
        RemoteError: the server does not answer.
        StorageFullError: the disk is full.
    """
    if since >= until:
        raise ConfigurationError(
            f"nothing lies between {since.isoformat()} and {until.isoformat()}",
            where="--since, --until",
            remedy="Give a range that ends after it begins; its end is no part of it",
        )
    temporary = temporary_sibling(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, glob.escape(path.name))
    rows, digest = 0, hashlib.sha256()
    with full_disk_named(path):
        try:
            with _connected(url) as connection, temporary.open("wb") as output:
                result = connection.execution_options(stream_results=True, max_row_buffer=_ROWS_AT_A_TIME).execute(
                    _query(connection, table, since, until)
                )
                for row in result:
                    line = _line(row._mapping)
                    output.write(line)
                    digest.update(line)
                    rows += 1
                    if rows % _ROWS_AT_A_TIME == 0:
                        on_progress(ProgressEvent("export", rows, None, "rows"))
                output.flush()
                os.fsync(output.fileno())
            exists = path.exists()
            changed = sha256_file(path) != digest.hexdigest() if exists else rows > 0
            if changed:
                temporary.chmod(0o644)
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    on_progress(ProgressEvent("export", rows, rows, "rows"))
    return SamplesExport(path=path if exists or changed else None, rows=rows, since=since, until=until, changed=changed)


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    import sqlalchemy as sa
    from sqlalchemy.exc import DBAPIError

    server = _parsed(url)
    engine = sa.create_engine(
        server.set(drivername="postgresql+psycopg2"),
        poolclass=sa.NullPool,
        # Columns without a time zone are compared, and written, as UTC.
        connect_args={"connect_timeout": 10, "application_name": "lora-assets", "options": "-c timezone=UTC"},
    )
    where = server.set(query={}).render_as_string(hide_password=True)
    try:
        with engine.connect() as connection:
            yield connection
    except DBAPIError as error:
        message = " ".join(str(error.orig).split())
        if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
            raise RemoteError(
                f"the samples' database does not answer: {message}",
                where=where,
                remedy="Check that the server runs and that SAMPLES_DATABASE_URL names it, its user and its database",
            ) from None
        raise ConfigurationError(
            f"the samples' database refuses the query: {message}",
            where=where,
            remedy="Check the user's rights, SAMPLES_TABLE, SAMPLES_COLUMNS and SAMPLES_TIME_COLUMN",
        ) from None
    except ValueError as error:
        # The server knows times that Python does not, such as those before the year 1.
        raise DatasetError(
            f"a sample has a value that cannot be read: {error}",
            where="SAMPLES_COLUMNS",
            remedy="Correct the row, or choose other columns",
        ) from error


def _parsed(url: str) -> URL:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        # The short scheme is what many servers hand out; SQLAlchemy knows only the long one.
        server = make_url(url.replace("postgres://", "postgresql://", 1))
    except (ArgumentError, ValueError):
        server = None
    if server is None or server.get_backend_name() != "postgresql":
        raise ConfigurationError(
            "not the URL of a PostgreSQL server",
            where="SAMPLES_DATABASE_URL",
            remedy="Write it as postgresql://user:password@host:5432/database",
        )
    return server


def _query(connection: Connection, table: SamplesTable, since: datetime, until: datetime) -> Select[Any]:
    import sqlalchemy as sa

    schema, _, name = table.name.rpartition(".")
    try:
        samples = sa.Table(name, sa.MetaData(), schema=schema or None, autoload_with=connection).alias("sample")
    except sa.exc.NoSuchTableError:
        raise ConfigurationError(
            f"the samples' database has no table {table.name}",
            where="SAMPLES_TABLE",
            remedy="Name the table, with its schema if that is not on the search path",
        ) from None
    known = set(samples.c.keys())
    for column, setting in [(table.time_column, "SAMPLES_TIME_COLUMN")] + [
        (column, "SAMPLES_COLUMNS") for column in table.columns.values()
    ]:
        if column not in known:
            raise ConfigurationError(
                f"the table {table.name} has no column {column}",
                where=setting,
                remedy=f"It has {', '.join(sorted(known))}",
            )
    moment = samples.c[table.time_column]
    return (
        sa.select(*(samples.c[column].label(field) for field, column in table.columns.items()))
        .where(moment >= since, moment < until)
        # Rows of one moment must come in one order too: that of their whole text.
        .order_by(moment, sa.text("CAST(sample AS text)"))
    )


def _line(row: Mapping[Any, Any]) -> bytes:
    record = {field: value for field, value in row.items() if value is not None}
    try:
        return _json(record, ensure_ascii=False)
    except UnicodeEncodeError:
        # A JSON column may hold half a surrogate pair; preparation will reject it and say where, as in any export.
        return _json(record, ensure_ascii=True)


def _json(record: Mapping[str, Any], *, ensure_ascii: bool) -> bytes:
    return json.dumps(record, ensure_ascii=ensure_ascii, separators=(",", ":"), default=_plain).encode() + b"\n"


def _plain(value: object) -> object:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, UUID):
        return str(value)
    raise DatasetError(
        f"a sample has a value that JSON cannot hold: {type(value).__name__}",
        where="SAMPLES_COLUMNS",
        remedy="Choose columns of text, numbers, truth values, times or JSON",
    )
