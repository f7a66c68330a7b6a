"""The run log: every training run is a row of `lora_training_runs` in PostgreSQL.

One row tells of one chain of attempts: the trainings of one `run_id` within one Dagster run and its
retries. A chain that runs or has failed is continued in its row; a completed one is history, and the next
training of that `run_id` gets a row of its own. What the table has no column for (Dagster's run, attempts,
host) lies beside it in `lora_training_run_details`, what a training really took, for the next plan's
estimates, in `lora_training_run_measurements`, and who may train at all in `lora_training_leases`.
"""

import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from finetune.errors import ConfigurationError, FinetuneError, RemoteError
from finetune.layout import DataLayout
from finetune.planning.history import Measurement
from finetune.progress import Progress, ignore_progress
from resources.lease import LEASE_SECONDS, Execute, Lease, hold_lease
from resources.orphans import ABANDONED_SECONDS, close_of_runs, close_unleased
from resources.postgres import EmbeddedPostgres
from resources.trainer import BACKEND_LABELS, Backend

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

_logger = logging.getLogger(__name__)

Status = Literal["RUNNING", "COMPLETED", "FAILED"]

_CONNECT_ATTEMPTS = 3
_SELECT = """
    SELECT run.*, detail.training_run_id, detail.dataset_date, detail.dagster_run_id, detail.attempts,
           detail.host, detail.external_run_url
    FROM lora_training_runs AS run LEFT JOIN lora_training_run_details AS detail USING (id)
"""


class TrainingRun(BaseModel):
    """One row of the run log; what lies beside the table is empty for rows that others wrote."""

    model_config = ConfigDict(frozen=True)

    id: int
    dataset_paths: list[str]
    base_model: str
    adapter_path: str | None
    backend: str
    external_run_id: str | None
    metrics: dict[str, Any]
    status: str
    error_message: str | None
    started_at: datetime
    finished_at: datetime | None
    created_at: datetime
    training_run_id: str | None = None
    dataset_date: str | None = None
    dagster_run_id: str | None = None
    attempts: int | None = None
    host: str | None = None
    external_run_url: str | None = None

    @property
    def backend_label(self) -> str:
        """What a person reads, such as ``Remote Training (H2O)``."""
        return BACKEND_LABELS.get(self.backend, self.backend)

    @property
    def seconds(self) -> float | None:
        """How long the run took, if it has ended."""
        return None if self.finished_at is None else (self.finished_at - self.started_at).total_seconds()


class Recording:
    """A row that is being written: hand it what the training finds."""

    def __init__(self, log: "RunLog", row_id: int) -> None:
        self._log = log
        self.id = row_id
        self.completed = False

    def external_run(self, external_run_id: str, url: str | None = None) -> None:
        """Note the remote experiment and the link to it."""
        self._log.set_external_run(self.id, external_run_id, url)

    def measured(self, measurement: Measurement) -> None:
        """Note what the training took."""
        self._log.measured(self.id, measurement)

    def complete(self, adapter_path: Path | str | None, metrics: Mapping[str, Any]) -> None:
        """Mark the row COMPLETED."""
        self._log.complete(self.id, adapter_path, metrics)
        self.completed = True


class RunLog(dg.ConfigurableResource):  # type: ignore[type-arg]  # generic in the value handed to assets: itself
    """`lora_training_runs` in the configured PostgreSQL, or in the embedded one under the data root."""

    database_url: str = Field(
        default="", repr=False, description="PostgreSQL URL (DATABASE_URL); empty means the embedded server."
    )
    data_dir: str = Field(description="Data root; the embedded PostgreSQL lies in its `postgres` directory.")

    _engine: Any = PrivateAttr(default=None)
    _embedded: EmbeddedPostgres | None = PrivateAttr(default=None)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Dagster's hook at the end of a step's process."""
        self.close()

    def close(self) -> None:
        """Let go of the connections and of the embedded server; the next call takes them up again."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
        if self._embedded is not None:
            self._embedded.close()
            self._embedded = None

    def start(
        self,
        *,
        run_id: str,
        dataset_paths: Sequence[Path | str],
        base_model: str,
        backend: Backend,
        date: str | None = None,
        dagster_run_id: str | None = None,
        dagster_root_run_id: str | None = None,
    ) -> int:
        """Open a row as RUNNING, or continue the row of an earlier attempt.

        Args:
            run_id: our training id.
            dataset_paths: the files that are trained on.
            base_model: its name as configured.
            backend: who trains.
            date: the dataset date (partition).
            dagster_run_id: the Dagster run that trains now.
            dagster_root_run_id: the first run of a chain of retries; the run itself by default.

        Returns:
            The row's id.

        Raises:
            RemoteError: the database cannot be reached.
            ConfigurationError: its tables cannot be made or used.
        """
        values: dict[str, Any] = {
            "run_id": run_id,
            "paths": [_text(str(path)) for path in dataset_paths],
            "base_model": _text(base_model),
            "backend": backend,
            "date": date,
            "dagster_run_id": dagster_run_id,
            "root": dagster_root_run_id or dagster_run_id or "",
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with self._transaction() as execute:
            execute("SELECT pg_advisory_xact_lock(hashtextextended(:run_id || ' ' || :root, 0))", values)
            earlier = execute(
                "SELECT run.id FROM lora_training_runs AS run JOIN lora_training_run_details USING (id) "
                "WHERE training_run_id = :run_id AND dagster_root_run_id = :root AND status <> 'COMPLETED' "
                "ORDER BY run.id DESC LIMIT 1",
                values,
            )
            if earlier:
                values["id"] = earlier[0]["id"]
                execute(
                    "UPDATE lora_training_runs SET status = 'RUNNING', error_message = NULL, finished_at = NULL, "
                    "dataset_paths = CAST(:paths AS text[]), base_model = :base_model, backend = :backend "
                    "WHERE id = :id",
                    values,
                )
                execute(
                    "UPDATE lora_training_run_details SET attempts = attempts + 1, dataset_date = :date, "
                    "dagster_run_id = :dagster_run_id, host = :host, pid = :pid WHERE id = :id",
                    values,
                )
                return int(values["id"])
            row = execute(
                "INSERT INTO lora_training_runs (dataset_paths, base_model, backend, status) "
                "VALUES (CAST(:paths AS text[]), :base_model, :backend, 'RUNNING') RETURNING id",
                values,
            )[0]
            values["id"] = row["id"]
            execute(
                "INSERT INTO lora_training_run_details "
                "(id, training_run_id, dataset_date, dagster_run_id, dagster_root_run_id, host, pid) "
                "VALUES (:id, :run_id, :date, :dagster_run_id, :root, :host, :pid)",
                values,
            )
            return int(values["id"])

    def lease(
        self, run_id: str, *, seconds: float = LEASE_SECONDS, on_progress: Progress = ignore_progress
    ) -> AbstractContextManager[Lease]:
        """Hold the lease of a training for a block: of all processes that ask for it, one gets it.

        Args:
            run_id: our training id.
            seconds: how long a lease holds without renewal, and how long another's is waited for.
            on_progress: told when another process is waited for.

        Raises:
            TransientError: another process trains this.
            RemoteError: the database cannot be reached.
            ConfigurationError: its tables cannot be made or used.
        """
        return hold_lease(self._transaction, run_id, seconds=seconds, on_progress=on_progress)

    def set_external_run(self, row_id: int, external_run_id: str, url: str | None = None) -> None:
        """Note the remote experiment of a row, and the link to it."""
        values = {"id": row_id, "external_run_id": external_run_id, "url": url}
        with self._transaction() as execute:
            execute("UPDATE lora_training_runs SET external_run_id = :external_run_id WHERE id = :id", values)
            execute("UPDATE lora_training_run_details SET external_run_url = :url WHERE id = :id", values)

    def complete(self, row_id: int, adapter_path: Path | str | None, metrics: Mapping[str, Any]) -> None:
        """Mark a row COMPLETED; figures that JSON cannot hold (NaN, infinities) are kept as text."""
        with self._transaction() as execute:
            execute(
                "UPDATE lora_training_runs SET status = 'COMPLETED', error_message = NULL, finished_at = NOW(), "
                "adapter_path = :path, metrics = CAST(:metrics AS jsonb) WHERE id = :id",
                {
                    "id": row_id,
                    "path": None if adapter_path is None else str(adapter_path),
                    "metrics": _json(metrics),
                },
            )

    def settle(
        self,
        *,
        run_id: str,
        adapter_path: Path | str,
        metrics: Mapping[str, Any],
        dagster_root_run_id: str | None = None,
    ) -> list[int]:
        """Mark COMPLETED what an earlier attempt could not: its adapter is there, its row does not say so.

        That is every RUNNING row of the training `run_id`, and the FAILED ones of this chain of attempts:
        a process may be killed, or the database away, between the adapter's publication and the row's end.

        Returns:
            The ids of the rows that were completed.
        """
        with self._transaction() as execute:
            rows = execute(
                "UPDATE lora_training_runs AS run SET status = 'COMPLETED', error_message = NULL, "
                "finished_at = NOW(), adapter_path = :path, metrics = CAST(:metrics AS jsonb) "
                "FROM lora_training_run_details AS detail WHERE detail.id = run.id "
                "AND detail.training_run_id = :run_id AND (run.status = 'RUNNING' "
                "OR run.status = 'FAILED' AND detail.dagster_root_run_id = :root) RETURNING run.id",
                {
                    "run_id": run_id,
                    "root": dagster_root_run_id or "",
                    "path": str(adapter_path),
                    "metrics": _json(metrics),
                },
            )
        return [int(row["id"]) for row in rows]

    def measured(self, row_id: int, measurement: Measurement) -> None:
        """Note what the training of a row took: device, memory, throughput; the last word counts."""
        with self._transaction() as execute:
            execute(
                "INSERT INTO lora_training_run_measurements "
                "(id, method, device, estimated_memory_gb, peak_memory_gb, tokens_per_second) "
                "VALUES (:id, :method, :device, :estimated_memory_gb, :peak_memory_gb, :tokens_per_second) "
                "ON CONFLICT (id) DO UPDATE SET method = EXCLUDED.method, device = EXCLUDED.device, "
                "estimated_memory_gb = EXCLUDED.estimated_memory_gb, peak_memory_gb = EXCLUDED.peak_memory_gb, "
                "tokens_per_second = EXCLUDED.tokens_per_second",
                {"id": row_id, **measurement.model_dump()},
            )

    def measurements(self, base_model: str, device: Literal["cpu", "cuda"], limit: int = 50) -> list[Measurement]:
        """What completed trainings of a base model took on this kind of device, newest first.

        Raises:
            RemoteError: the database cannot be reached.
            ConfigurationError: its tables cannot be made or used.
        """
        with self._transaction() as execute:
            rows = execute(
                "SELECT measured.* FROM lora_training_run_measurements AS measured "
                "JOIN lora_training_runs AS run USING (id) WHERE run.base_model = :base_model "
                "AND run.status = 'COMPLETED' AND (measured.device = 'cpu') = :on_cpu "
                "ORDER BY run.finished_at DESC, id DESC LIMIT :limit",
                {"base_model": _text(base_model), "on_cpu": device == "cpu", "limit": limit},
            )
        return [Measurement.model_validate(row) for row in rows]

    def fail(self, row_id: int, error_message: str) -> None:
        """Mark a RUNNING row of this process FAILED; one that has ended, or that a retry took over, stays as it is."""
        with self._transaction() as execute:
            execute(
                "UPDATE lora_training_runs AS run SET status = 'FAILED', error_message = :message, "
                "finished_at = NOW() FROM lora_training_run_details AS detail WHERE run.id = :id "
                "AND detail.id = run.id AND run.status = 'RUNNING' AND detail.host = :host AND detail.pid = :pid",
                {
                    "id": row_id,
                    "message": _text(error_message),
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                },
            )

    @contextmanager
    def recording(
        self,
        *,
        run_id: str,
        dataset_paths: Sequence[Path | str],
        base_model: str,
        backend: Backend,
        date: str | None = None,
        dagster_run_id: str | None = None,
        dagster_root_run_id: str | None = None,
    ) -> Iterator[Recording]:
        """Keep a row for the block: RUNNING meanwhile, FAILED with the error if it does not complete.

        Arguments and errors are those of `start`. Interrupts count as errors. An error of the log itself
        never hides the block's own.
        """
        recording = Recording(
            self,
            self.start(
                run_id=run_id,
                dataset_paths=dataset_paths,
                base_model=base_model,
                backend=backend,
                date=date,
                dagster_run_id=dagster_run_id,
                dagster_root_run_id=dagster_root_run_id,
            ),
        )
        try:
            yield recording
        except BaseException as error:
            message = str(error) if isinstance(error, FinetuneError) else f"{type(error).__name__}: {error}"
            try:
                self.fail(recording.id, message.removesuffix(": "))
            except FinetuneError as log_error:
                error.add_note(f"The run log could not be told: {log_error}")
                _logger.warning("training run %s stays RUNNING in the run log: %s", recording.id, log_error)
            raise
        if not recording.completed:
            self.fail(recording.id, "the training step ended without a result")

    def recent(self, limit: int = 20, *, status: Status | None = None) -> list[TrainingRun]:
        """The newest rows, newest first, those of one status if asked.

        Raises:
            RemoteError: the database cannot be reached.
            ConfigurationError: its tables cannot be made or used.
        """
        condition = "" if status is None else "WHERE run.status = :status"
        with self._transaction() as execute:
            rows = execute(
                f"{_SELECT} {condition} ORDER BY run.started_at DESC, run.id DESC LIMIT :limit",
                {"limit": limit, "status": status},
            )
        return [TrainingRun.model_validate(row) for row in rows]

    def close_orphans(self, is_over: Callable[[str], str | None]) -> list[TrainingRun]:
        """Mark FAILED the RUNNING rows whose Dagster run is over.

        Args:
            is_over: given a Dagster run's id, the reason why nobody works on it any more, or None while
                somebody may.

        Returns:
            The rows that were closed.
        """
        return self._rows(close_of_runs(self._transaction, is_over))

    def close_abandoned(self, seconds: float = ABANDONED_SECONDS) -> list[TrainingRun]:
        """Mark FAILED the RUNNING rows whose training's lease nobody has renewed for a while: its process is dead.

        That needs no word of Dagster's, which may have been killed along, or know nothing of the run: a row
        is RUNNING only while the process that wrote it holds the lease. Whoever tries the training again
        within the same run takes the row up again.

        Args:
            seconds: how long a lease must have been over, by the database's clock.

        Returns:
            The rows that were closed.
        """
        return self._rows(close_unleased(self._transaction, seconds))

    def live_trainings(self) -> set[str]:
        """The training ids that somebody works on: those of RUNNING rows and of leases that hold.

        Raises:
            RemoteError: the database cannot be reached.
            ConfigurationError: its tables cannot be made or used.
        """
        with self._transaction() as execute:
            rows = execute(
                "SELECT training_run_id FROM lora_training_leases WHERE expires_at > clock_timestamp() "
                "UNION SELECT detail.training_run_id FROM lora_training_run_details AS detail "
                "JOIN lora_training_runs AS run USING (id) WHERE run.status = 'RUNNING'",
                {},
            )
        return {str(row["training_run_id"]) for row in rows}

    def totals(self) -> list[dict[str, Any]]:
        """Of each backend and status: ``runs``, ``gpu_hours``, ``tokens`` and ``seconds`` of all its rows together."""
        with self._transaction() as execute:
            return execute(
                "SELECT backend, status, count(*) AS runs, "
                "COALESCE(sum(CAST(metrics ->> 'gpu_hours' AS double precision)), 0) AS gpu_hours, "
                "COALESCE(sum(CAST(metrics ->> 'tokens_seen' AS double precision)), 0) AS tokens, "
                "CAST(COALESCE(sum(EXTRACT(EPOCH FROM finished_at - started_at)), 0) AS double precision) AS seconds "
                "FROM lora_training_runs GROUP BY backend, status ORDER BY backend, status",
                {},
            )

    def _rows(self, ids: list[int]) -> list[TrainingRun]:
        if not ids:
            return []
        with self._transaction() as execute:
            rows = execute(f"{_SELECT} WHERE run.id = ANY(:ids) ORDER BY run.id", {"ids": ids})
        return [TrainingRun.model_validate(row) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[Execute]:
        """One transaction; yields a function that runs a statement and returns its rows."""
        from sqlalchemy import text
        from sqlalchemy.exc import DBAPIError

        connection = self._connect()
        try:
            with connection, connection.begin():

                def execute(statement: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
                    result = connection.execute(text(statement), dict(values))
                    return [dict(row) for row in result.mappings()] if result.returns_rows else []

                yield execute
        except DBAPIError as error:
            raise self._named(error) from None

    def _connect(self) -> "Connection":
        from sqlalchemy.exc import DBAPIError, OperationalError

        for attempt in range(1, _CONNECT_ATTEMPTS + 1):
            try:
                if self._engine is None:
                    engine = self._make_engine()
                    with engine.begin() as connection:
                        from resources.migrations import upgrade

                        upgrade(connection)
                    self._engine = engine
                connection = self._engine.connect()
            except OperationalError as error:
                if attempt == _CONNECT_ATTEMPTS:
                    raise self._named(error) from None
                time.sleep(0.2 * 2**attempt)
                if self._embedded is not None:
                    self._embedded.ensure_running()
            except DBAPIError as error:
                raise self._named(error) from None
            else:
                return connection  # type: ignore[no-any-return]  # the engine is Any: pydantic would import SQLAlchemy
        raise AssertionError("unreachable")

    def _make_engine(self) -> "Engine":
        from sqlalchemy import NullPool, create_engine
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        if not self.database_url and self._embedded is None:
            self._embedded = EmbeddedPostgres(DataLayout(Path(self.data_dir)).postgres)
        configured = self.database_url or (self._embedded.url if self._embedded else "")
        try:
            # The short scheme is what many servers hand out; SQLAlchemy knows only the long one.
            url = make_url(configured.replace("postgres://", "postgresql://", 1))
        except (ArgumentError, ValueError):
            url = None
        if url is None or url.get_backend_name() != "postgresql":
            raise ConfigurationError(
                "not the URL of a PostgreSQL server",
                where="DATABASE_URL",
                remedy="Write it as postgresql://user:password@host:5432/database, or unset it for the embedded one",
            )
        # No connection is kept through hours of training for a server to drop.
        return create_engine(
            url.set(drivername="postgresql+psycopg2"),
            poolclass=NullPool,
            connect_args={"connect_timeout": 10, "application_name": "lora-assets"},
        )

    def _named(self, error: Any) -> FinetuneError:
        """A DBAPI error as one of ours, without the password."""
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import InterfaceError, OperationalError

        message = " ".join(str(error.orig).split())
        where = "the embedded PostgreSQL"
        if self.database_url:
            url = make_url(self.database_url.replace("postgres://", "postgresql://", 1))
            where = f"DATABASE_URL={url.set(query={}).render_as_string(hide_password=True)}"
            # libpq takes passwords as parameters too.
            parameters = [str(value) for name, value in url.query.items() if "pass" in name]
            for secret in filter(None, [url.password, *parameters]):
                message = message.replace(secret, "***")
        if isinstance(error, OperationalError | InterfaceError):
            return RemoteError(
                f"the run log's database does not answer: {message}",
                where=where,
                remedy="Check that the server runs and that DATABASE_URL names it, its user and its database",
            )
        return ConfigurationError(
            f"the run log's database refuses a statement: {message}",
            where=where,
            remedy="Check the user's rights and that nobody else changed the tables",
        )


def _text(value: str) -> str:
    # PostgreSQL's TEXT holds neither NUL nor lone surrogates.
    return value.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def _json(value: Mapping[str, Any]) -> str:
    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return str(item)
        if isinstance(item, str):
            return _text(item)
        if isinstance(item, Mapping):
            return {_text(str(key)): plain(each) for key, each in item.items()}
        if isinstance(item, list | tuple):
            return [plain(each) for each in item]
        return item

    return json.dumps(plain(value), allow_nan=False, default=str)
