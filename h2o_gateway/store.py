"""The gateway's memory: experiments, and callbacks that are still to be delivered, in SQLite.

Every method is one transaction, so that a gateway that is killed at any moment finds a consistent state.
"""

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from h2o_gateway.models import ExperimentRequest, Status

_SCHEMA = """
CREATE TABLE IF NOT EXISTS experiments (
    position        INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT NOT NULL UNIQUE,
    idempotency_key TEXT UNIQUE,
    request         TEXT NOT NULL,
    status          TEXT NOT NULL,
    gpu             TEXT,
    attempt         INTEGER NOT NULL DEFAULT 1,
    stopping        INTEGER NOT NULL DEFAULT 0,
    error           TEXT NOT NULL DEFAULT '',
    sha256          TEXT,
    bytes           INTEGER,
    created_at      REAL NOT NULL,
    started_at      REAL,
    finished_at     REAL
);
CREATE INDEX IF NOT EXISTS experiments_by_status ON experiments (status, position);
CREATE TABLE IF NOT EXISTS callbacks (
    position      INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL,
    experiment_id TEXT NOT NULL,
    status        TEXT NOT NULL,
    created_at    REAL NOT NULL
);
"""


@dataclass(frozen=True)
class Row:
    """An experiment as it is remembered; times in seconds since the epoch."""

    position: int
    id: str
    idempotency_key: str | None
    request: ExperimentRequest
    status: Status
    gpu: str | None
    attempt: int
    stopping: bool
    error: str
    sha256: str | None
    bytes: int | None
    created_at: float
    started_at: float | None
    finished_at: float | None


@dataclass(frozen=True)
class Callback:
    """A change of status that the webhook has not been told of yet."""

    position: int
    id: str
    experiment_id: str
    status: Status
    created_at: float


@dataclass(frozen=True)
class Share:
    """Of one status: how many experiments, and how many seconds those trained that began and have ended."""

    experiments: int
    trained: int
    seconds: float


@dataclass(frozen=True)
class Tally:
    """All experiments in figures; times in seconds, `oldest_queued` since the epoch."""

    by_status: dict[Status, Share]
    started: int
    waited: float
    oldest_queued: float | None
    callbacks: int


class Store:
    """The database at `path`; usable from several threads.

    Args:
        path: the file; made if it is not there.
        callbacks: whether changes of status are to be told.
    """

    def __init__(self, path: Path, *, callbacks: bool) -> None:
        self._path = path
        self._callbacks = callbacks
        with self._transaction() as connection:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)

    def create(self, request: ExperimentRequest) -> tuple[Row, bool]:
        """Queue an experiment, unless one with its idempotency key is there; and whether it is new."""
        with self._transaction() as connection:
            if request.idempotency_key is not None:
                known = self._select(connection, "WHERE idempotency_key = ?", (request.idempotency_key,))
                if known:
                    return known[0], False
            identifier = f"exp-{secrets.token_hex(8)}"
            connection.execute(
                "INSERT INTO experiments (id, idempotency_key, request, status, created_at) VALUES (?, ?, ?, ?, ?)",
                (identifier, request.idempotency_key, request.model_dump_json(), "queued", time.time()),
            )
            self._tell(connection, identifier, "queued")
            return self._select(connection, "WHERE id = ?", (identifier,))[0], True

    def get(self, identifier: str) -> Row | None:
        """The experiment, or None."""
        with self._transaction() as connection:
            found = self._select(connection, "WHERE id = ?", (identifier,))
            return found[0] if found else None

    def page(self, key: str | None, limit: int, offset: int) -> tuple[list[Row], int]:
        """Experiments, the newest first, and how many there are in all; with `key`, those of that key."""
        where, values = ("", ()) if key is None else ("WHERE idempotency_key = ?", (key,))
        with self._transaction() as connection:
            rows = self._select(
                connection, f"{where} ORDER BY position DESC LIMIT ? OFFSET ?", (*values, limit, offset)
            )
            total = connection.execute(f"SELECT count(*) FROM experiments {where}", values).fetchone()[0]  # noqa: S608 - constants
            return rows, total

    def with_status(self, status: Status) -> list[Row]:
        """Experiments of a status, the oldest first."""
        with self._transaction() as connection:
            return self._select(connection, "WHERE status = ? ORDER BY position", (status,))

    def count(self, status: Status, *, before: int | None = None) -> int:
        """How many experiments have a status; with `before`, how many of a lesser position."""
        with self._transaction() as connection:
            counted = connection.execute(
                "SELECT count(*) FROM experiments WHERE status = ? AND (? IS NULL OR position < ?)",
                (status, before, before),
            )
            return int(counted.fetchone()[0])

    def tally(self) -> Tally:
        """All experiments in figures; every status is told of, also those that none has."""
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT status, count(*), count(finished_at - started_at), total(finished_at - started_at) "
                "FROM experiments GROUP BY status"
            ).fetchall()
            found = {status: Share(int(n), int(trained), float(seconds)) for status, n, trained, seconds in rows}
            started, waited, oldest = connection.execute(
                "SELECT count(started_at), total(started_at - created_at), "
                "min(CASE WHEN status = 'queued' THEN created_at END) FROM experiments"
            ).fetchone()
            callbacks = connection.execute("SELECT count(*) FROM callbacks").fetchone()[0]
        by_status = {status: found.get(status, Share(0, 0, 0.0)) for status in get_args(Status)}
        return Tally(by_status, int(started), float(waited), oldest, int(callbacks))

    def start_next(self, gpu: str) -> Row | None:
        """Give the device to the oldest queued experiment, if there is one."""
        with self._transaction() as connection:
            waiting = self._select(connection, "WHERE status = 'queued' ORDER BY position LIMIT 1")
            if not waiting:
                return None
            connection.execute(
                "UPDATE experiments SET status = 'running', gpu = ?, started_at = ? WHERE id = ?",
                (gpu, time.time(), waiting[0].id),
            )
            self._tell(connection, waiting[0].id, "running")
            return self._select(connection, "WHERE id = ?", (waiting[0].id,))[0]

    def begin_anew(self, identifier: str) -> Row:
        """Count one more attempt of a running experiment."""
        with self._transaction() as connection:
            connection.execute("UPDATE experiments SET attempt = attempt + 1 WHERE id = ?", (identifier,))
            return self._select(connection, "WHERE id = ?", (identifier,))[0]

    def stop(self, identifier: str) -> Row:
        """End a queued experiment, ask for the end of a running one, leave one that has ended."""
        with self._transaction() as connection:
            [row] = self._select(connection, "WHERE id = ?", (identifier,))
            if row.status == "queued":
                self._end(connection, identifier, "stopped", "cancelled before it began", None, None)
            elif row.status == "running":
                connection.execute("UPDATE experiments SET stopping = 1 WHERE id = ?", (identifier,))
            return self._select(connection, "WHERE id = ?", (identifier,))[0]

    def end(
        self, identifier: str, status: Status, *, error: str = "", sha256: str | None = None, size: int | None = None
    ) -> None:
        """Record how an experiment has ended, and free its device."""
        with self._transaction() as connection:
            self._end(connection, identifier, status, error, sha256, size)

    def next_callback(self) -> Callback | None:
        """The oldest callback that has not been delivered."""
        with self._transaction() as connection:
            row = connection.execute("SELECT * FROM callbacks ORDER BY position LIMIT 1").fetchone()
            return Callback(**dict(row)) if row else None

    def drop_callback(self, position: int) -> None:
        """Forget a callback."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM callbacks WHERE position = ?", (position,))

    def _end(
        self,
        connection: sqlite3.Connection,
        identifier: str,
        status: Status,
        error: str,
        sha256: str | None,
        size: int | None,
    ) -> None:
        connection.execute(
            "UPDATE experiments SET status = ?, error = ?, sha256 = ?, bytes = ?, finished_at = ? WHERE id = ?",
            (status, error, sha256, size, time.time(), identifier),
        )
        self._tell(connection, identifier, status)

    def _tell(self, connection: sqlite3.Connection, identifier: str, status: Status) -> None:
        if self._callbacks:
            connection.execute(
                "INSERT INTO callbacks (id, experiment_id, status, created_at) VALUES (?, ?, ?, ?)",
                (secrets.token_hex(16), identifier, status, time.time()),
            )

    def _select(self, connection: sqlite3.Connection, rest: str, values: Sequence[object] = ()) -> list[Row]:
        rows = connection.execute(f"SELECT * FROM experiments {rest}", values).fetchall()  # noqa: S608 - constants
        return [_row(row) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
        finally:
            connection.close()


def _row(row: sqlite3.Row) -> Row:
    values = dict(row)
    request = ExperimentRequest.model_validate(json.loads(values.pop("request")))
    return Row(**values | {"request": request, "stopping": bool(values["stopping"])})
