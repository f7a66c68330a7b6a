"""Starting trainings, watching them, and telling how they have ended.

Nothing that matters is kept in this process: each look compares what the store says with what is on the
disk and which locks are held (`h2o_gateway.attempt`), so a gateway that was killed goes on from there.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from finetune.errors import FinetuneError
from finetune.publishing import TEMPORARY_MARK, write_bytes_atomically
from h2o_gateway.archive import write_archive
from h2o_gateway.attempt import Attempt, machine
from h2o_gateway.datasets import Datasets
from h2o_gateway.progress import read_progress, training_log
from h2o_gateway.settings import PREFIX, Settings
from h2o_gateway.start import Job
from h2o_gateway.store import Row, Store

_logger = logging.getLogger(__name__)
# A training that brings the machine down must not do so for ever.
_ATTEMPTS = 3


class Supervisor:
    """Runs the queue in a thread of its own.

    Args:
        settings: devices, commands, times.
        store: what shall be trained.
        datasets: on what.
    """

    def __init__(self, settings: Settings, store: Store, datasets: Datasets) -> None:
        self._settings = settings
        self._store = store
        self._datasets = datasets
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._asked_to_stop: dict[str, float] = {}
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking; trainings go on, and the next gateway looks after them."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def look_soon(self) -> None:
        """Something has changed."""
        self._wake.set()

    @property
    def is_working(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def attempt(self, row: Row) -> Attempt:
        """The current attempt of an experiment."""
        return Attempt(self._directory(row) / f"attempt-{row.attempt}")

    def archive(self, row: Row) -> Path:
        """Where the adapter of a finished experiment lies."""
        return self._directory(row) / "adapter.zip"

    def _directory(self, row: Row) -> Path:
        return self._settings.data_dir / "experiments" / row.id

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            with _logged("the experiments"):
                self._look()
            self._wake.wait(self._settings.poll_seconds)

    def _look(self) -> None:
        for row in self._store.with_status("running"):
            with _logged(row.id):
                self._look_at(row)
        busy = {row.gpu for row in self._store.with_status("running")}
        for gpu in self._settings.slots:
            if gpu not in busy and (started := self._store.start_next(gpu)):
                self._begin(started)

    def _look_at(self, row: Row) -> None:
        attempt = self.attempt(row)
        child = self._children.get(row.id)
        starting = child is not None and child.poll() is None
        record = attempt.record()
        if attempt.is_alive() or (starting and record is None):
            if row.stopping:
                self._stop(row, attempt)
            elif attempt.is_orphaned():
                attempt.kill(signal.SIGKILL)
            return
        if row.stopping:
            self._end(row, "stopped", "cancelled")
        elif record is None and child is None:
            # The gateway before this one was killed between its note and its deed.
            self._begin(row)
        elif record is None:
            self._end(row, "failed", f"the training could not be started: {_last_line(attempt)}")
        elif attempt.flags().get("status") == "finished":
            self._finish(row, attempt)
        elif record.machine != machine() and row.attempt < _ATTEMPTS:
            _logger.warning("%s was interrupted by a restart of the machine and begins anew", row.id)
            self._begin(self._store.begin_anew(row.id))
        else:
            info = attempt.flags().get("info")
            why = f"{info}; " if isinstance(info, str) else ""
            self._end(row, "failed", f"the training's process has ended unfinished: {why}{_last_line(attempt)}")

    def _begin(self, row: Row) -> None:
        attempt = self.attempt(row)
        dataset = self._datasets.path(row.request.dataset_id)
        if dataset is None:
            self._end(row, "failed", "the dataset has vanished from the disk")
            return
        settings = self._settings
        job = Job(
            request=row.request,
            name=row.request.name or row.id,
            dataset=dataset,
            model_path=settings.model_paths.get(row.request.base_model),
            cache_dir=settings.data_dir / "cache",
            command=settings.command(attempt.config),
            studio_dir=settings.studio_dir,
            trust_remote_code=settings.trust_remote_code,
            workers=settings.studio_workers,
        )
        write_bytes_atomically(attempt.job, job.model_dump_json(indent=2).encode())
        environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        environment["CUDA_VISIBLE_DEVICES"] = row.gpu or ""
        environment["PYTHONUNBUFFERED"] = "1"
        with attempt.log.open("ab") as log:
            self._children[row.id] = subprocess.Popen(
                [sys.executable, "-m", "h2o_gateway.start", str(attempt.directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        _logger.info("%s begins on device %s, attempt %d", row.id, row.gpu, row.attempt, extra=_context(row))

    def _stop(self, row: Row, attempt: Attempt) -> None:
        first = self._asked_to_stop.setdefault(row.id, time.monotonic())
        late = time.monotonic() - first >= self._settings.stop_grace_seconds
        attempt.kill(signal.SIGKILL if late else signal.SIGTERM)

    def _finish(self, row: Row, attempt: Attempt) -> None:
        progress = read_progress(attempt.output, row.request.config)
        for leftover in self._directory(row).glob(f".*{TEMPORARY_MARK}*"):
            leftover.unlink()
        try:
            sha256, size = write_archive(self.archive(row), attempt.output, training_log(progress.points))
        except FinetuneError as error:
            self._end(row, "failed", str(error))
            return
        self._store.end(row.id, "finished", sha256=sha256, size=size)
        _logger.info("%s has finished after %d steps", row.id, progress.step, extra=_context(row))
        self._forget(row)

    def _end(self, row: Row, status: Literal["failed", "stopped"], error: str) -> None:
        self._store.end(row.id, status, error=error)
        _logger.warning("%s has %s: %s", row.id, status, error, extra=_context(row))
        self._forget(row)

    def _forget(self, row: Row) -> None:
        self._children.pop(row.id, None)
        self._asked_to_stop.pop(row.id, None)


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """A full disk may pass, and the other experiments need their watch meanwhile."""
    try:
        yield
    except Exception:
        _logger.exception("a look at %s failed; the next one follows", what)


def _context(row: Row) -> dict[str, object]:
    """Fields of a log line: the experiment, and the client's training, dataset and attempt."""
    return {
        "experiment": row.id,
        "run_id": row.idempotency_key,
        "dataset": row.request.dataset_id,
        "attempt": row.attempt,
        "device": row.gpu,
    }


def _last_line(attempt: Attempt) -> str:
    lines = attempt.log_lines(1)
    return lines[0][:500] if lines else "it said nothing"
