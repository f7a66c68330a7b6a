"""The run log: every training run is a row of `lora_training_runs` in PostgreSQL.

One row tells of one chain of attempts: the trainings of one `run_id` within one Dagster run and its
retries. A chain that runs or has failed is continued in its row; a completed one is history, and the next
training of that `run_id` gets a row of its own. What the table has no column for (Dagster's run, attempts,
host) lies beside it in `lora_training_run_details`, what a training really took, for the next plan's
estimates, in `lora_training_run_measurements`, and who may train at all in `lora_training_leases`.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, Unpack

from finetune.errors import FinetuneError
from finetune.planning.history import Measurement
from finetune.progress import Progress, ignore_progress
from resources.database import Database, storable_json, storable_text
from resources.lease import LEASE_SECONDS, Lease, hold_lease
from resources.orphans import ABANDONED_SECONDS, close_of_runs, close_unleased
from resources.trainer import Backend
from resources.training_run import Status, TrainingRun

_logger = logging.getLogger(__name__)

_SELECT = """
    SELECT run.*, detail.training_run_id, detail.dataset_date, detail.dagster_run_id, detail.attempts,
           detail.host, detail.external_run_url
    FROM lora_training_runs AS run LEFT JOIN lora_training_run_details AS detail USING (id)
"""
_FAILED_FOR = "WHERE run.status = 'FAILED' AND run.backend = :backend AND starts_with(run.error_message, :reason)"
_TAKEN_UP = """
    SELECT 1 FROM lora_training_runs AS other JOIN lora_training_run_details AS taken USING (id)
    WHERE taken.training_run_id = detail.training_run_id AND other.id <> run.id
    AND (other.status = 'RUNNING' OR other.finished_at > run.finished_at)
"""


class Facts(TypedDict):
    """What is known of a training before it begins.

    Attributes:
        run_id: our training id.
        dataset_paths: the files that are trained on.
        base_model: its name as configured.
        backend: who trains.
        date: the dataset date (partition).
        dagster_run_id: the Dagster run that trains now.
        dagster_root_run_id: the first run of a chain of retries; the run itself by default.
    """

    run_id: str
    dataset_paths: Sequence[Path | str]
    base_model: str
    backend: Backend
    date: NotRequired[str | None]
    dagster_run_id: NotRequired[str | None]
    dagster_root_run_id: NotRequired[str | None]


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


class RunLog(Database):
    """`lora_training_runs`, and what lies beside it."""

    def start(self, **facts: Unpack[Facts]) -> int:
        """Open a row as RUNNING, or continue the row of an earlier attempt.

        Returns:
            The row's id.

        Raises:
            RemoteError: the database cannot be reached.
            ConfigurationError: its tables cannot be made or used.
        """
        values: dict[str, Any] = {
            "run_id": facts["run_id"],
            "paths": [storable_text(str(path)) for path in facts["dataset_paths"]],
            "base_model": storable_text(facts["base_model"]),
            "backend": facts["backend"],
            "date": facts.get("date"),
            "dagster_run_id": facts.get("dagster_run_id"),
            "root": facts.get("dagster_root_run_id") or facts.get("dagster_run_id") or "",
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with self.transaction() as execute:
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
        return hold_lease(self.transaction, run_id, seconds=seconds, on_progress=on_progress)

    def set_external_run(self, row_id: int, external_run_id: str, url: str | None = None) -> None:
        """Note the remote experiment of a row, and the link to it."""
        values = {"id": row_id, "external_run_id": external_run_id, "url": url}
        with self.transaction() as execute:
            execute("UPDATE lora_training_runs SET external_run_id = :external_run_id WHERE id = :id", values)
            execute("UPDATE lora_training_run_details SET external_run_url = :url WHERE id = :id", values)

    def complete(self, row_id: int, adapter_path: Path | str | None, metrics: Mapping[str, Any]) -> None:
        """Mark a row COMPLETED; figures that JSON cannot hold (NaN, infinities) are kept as text."""
        with self.transaction() as execute:
            execute(
                "UPDATE lora_training_runs SET status = 'COMPLETED', error_message = NULL, finished_at = NOW(), "
                "adapter_path = :path, metrics = CAST(:metrics AS jsonb) WHERE id = :id",
                {
                    "id": row_id,
                    "path": None if adapter_path is None else str(adapter_path),
                    "metrics": storable_json(metrics),
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
        with self.transaction() as execute:
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
                    "metrics": storable_json(metrics),
                },
            )
        return [int(row["id"]) for row in rows]

    def measured(self, row_id: int, measurement: Measurement) -> None:
        """Note what the training of a row took: device, memory, throughput; the last word counts."""
        with self.transaction() as execute:
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
        with self.transaction() as execute:
            rows = execute(
                "SELECT measured.* FROM lora_training_run_measurements AS measured "
                "JOIN lora_training_runs AS run USING (id) WHERE run.base_model = :base_model "
                "AND run.status = 'COMPLETED' AND (measured.device = 'cpu') = :on_cpu "
                "ORDER BY run.finished_at DESC, id DESC LIMIT :limit",
                {"base_model": storable_text(base_model), "on_cpu": device == "cpu", "limit": limit},
            )
        return [Measurement.model_validate(row) for row in rows]

    def fail(self, row_id: int, error_message: str) -> None:
        """Mark a RUNNING row of this process FAILED; one that has ended, or that a retry took over, stays as it is."""
        with self.transaction() as execute:
            execute(
                "UPDATE lora_training_runs AS run SET status = 'FAILED', error_message = :message, "
                "finished_at = NOW() FROM lora_training_run_details AS detail WHERE run.id = :id "
                "AND detail.id = run.id AND run.status = 'RUNNING' AND detail.host = :host AND detail.pid = :pid",
                {
                    "id": row_id,
                    "message": storable_text(error_message),
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                },
            )

    @contextmanager
    def recording(self, **facts: Unpack[Facts]) -> Iterator[Recording]:
        """Keep a row for the block: RUNNING meanwhile, FAILED with the error if it does not complete.

        Errors are those of `start`. Interrupts count as errors. An error of the log itself never hides the block's
        own.
        """
        recording = Recording(self, self.start(**facts))
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
        with self.transaction() as execute:
            rows = execute(
                f"{_SELECT} {condition} ORDER BY run.started_at DESC, run.id DESC LIMIT :limit",
                {"limit": limit, "status": status},
            )
        return [TrainingRun.model_validate(row) for row in rows]

    def failed_for(self, reason: str, backend: Backend) -> list[TrainingRun]:
        """The FAILED rows of a backend whose error begins with `reason`, in no order.

        Without those whose training another row has taken up since.

        Raises:
            RemoteError: the database cannot be reached.
            ConfigurationError: its tables cannot be made or used.
        """
        with self.transaction() as execute:
            rows = execute(
                f"{_SELECT} {_FAILED_FOR} AND NOT EXISTS ({_TAKEN_UP}) ORDER BY random()",
                {"reason": reason, "backend": backend},
            )
        return [TrainingRun.model_validate(row) for row in rows]

    def correct(self, row: TrainingRun, error_message: str) -> None:
        """Replace the error of a FAILED row, unless the row has changed since it was read."""
        with self.transaction() as execute:
            execute(
                "UPDATE lora_training_runs SET error_message = :message "
                "WHERE id = :id AND status = 'FAILED' AND error_message = :before",
                {"id": row.id, "message": storable_text(error_message), "before": row.error_message},
            )

    def close_orphans(self, is_over: Callable[[str], str | None]) -> list[TrainingRun]:
        """Mark FAILED the RUNNING rows whose Dagster run is over.

        Args:
            is_over: given a Dagster run's id, the reason why nobody works on it any more, or None while
                somebody may.

        Returns:
            The rows that were closed.
        """
        return self._rows(close_of_runs(self.transaction, is_over))

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
        return self._rows(close_unleased(self.transaction, seconds))

    def live_trainings(self) -> set[str]:
        """The training ids that somebody works on: those of RUNNING rows and of leases that hold.

        Raises:
            RemoteError: the database cannot be reached.
            ConfigurationError: its tables cannot be made or used.
        """
        with self.transaction() as execute:
            rows = execute(
                "SELECT training_run_id FROM lora_training_leases WHERE expires_at > clock_timestamp() "
                "UNION SELECT detail.training_run_id FROM lora_training_run_details AS detail "
                "JOIN lora_training_runs AS run USING (id) WHERE run.status = 'RUNNING'",
                {},
            )
        return {str(row["training_run_id"]) for row in rows}

    def totals(self) -> list[dict[str, Any]]:
        """Of each backend and status: ``runs``, ``gpu_hours``, ``tokens`` and ``seconds`` of all its rows together."""
        with self.transaction() as execute:
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
        with self.transaction() as execute:
            rows = execute(f"{_SELECT} WHERE run.id = ANY(:ids) ORDER BY run.id", {"ids": ids})
        return [TrainingRun.model_validate(row) for row in rows]
