"""The lease of a training: of all processes that could train the same, one may.

A row of `lora_training_leases` says who holds the lease and until when, by the database's clock. Its token
grows by one with every process that takes the lease (a fencing token: Kleppmann 2016, "How to do
distributed locking"), so that a process that was paused beyond its lease finds another token than its own
and stops, and never gets the lease back by being late. The holder renews it from a thread of its own.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import FinetuneError, RemoteError, TransientError
from finetune.progress import Progress, ProgressEvent
from resources.database import Transaction

_logger = logging.getLogger(__name__)

# How long a process that died elsewhere stands in the way of the next, and a database may be away.
LEASE_SECONDS = 60.0
_POLL_SECONDS = 0.5

_TAKE = """
    INSERT INTO lora_training_leases AS lease (training_run_id, token, holder, process, expires_at)
    VALUES (:run_id, 1, :holder, :process, clock_timestamp() + make_interval(secs => :seconds))
    ON CONFLICT (training_run_id) DO UPDATE SET token = lease.token + 1, holder = EXCLUDED.holder,
        process = EXCLUDED.process, expires_at = EXCLUDED.expires_at
    WHERE lease.expires_at <= clock_timestamp() OR lease.token = :abandoned
    RETURNING token
"""
_RENEW = """
    UPDATE lora_training_leases SET expires_at = clock_timestamp() + make_interval(secs => :seconds)
    WHERE training_run_id = :run_id AND token = :token RETURNING token
"""


class Lease:
    """The right to train, while `still_mine` says so.

    Args:
        transaction: the run log's.
        run_id: our training id.
        token: the fencing token of this process.
        seconds: for how long each renewal holds.
    """

    def __init__(self, transaction: Transaction, run_id: str, token: int, seconds: float) -> None:
        self.token = token
        self._transaction = transaction
        self._values = {"run_id": run_id, "token": token, "seconds": seconds}
        self._seconds = seconds
        self._lost = False
        self._safe_until = time.monotonic()

    def still_mine(self) -> bool:
        """Ask the database whether the token is still the newest; if so, the lease is renewed.

        Raises:
            RemoteError: the database has been away for longer than the lease holds.
        """
        try:
            self._renew()
        except RemoteError:
            # Before that moment nobody can have taken the lease.
            if time.monotonic() >= self._safe_until:
                raise
        return not self._lost

    def _renew(self) -> None:
        if self._lost:
            return
        asked = time.monotonic()
        with self._transaction() as execute:
            self._lost = not execute(_RENEW, self._values)
        self._safe_until = asked + self._seconds

    def _keep(self, ended: threading.Event) -> None:
        while not self._lost and not ended.wait(self._seconds / 3):
            try:
                self._renew()
            except FinetuneError as error:
                _logger.warning("the lease of training %s could not be renewed: %s", self._values["run_id"], error)

    def _release(self) -> None:
        try:
            with self._transaction() as execute:
                execute(_RENEW, {**self._values, "seconds": 0.0})
        except FinetuneError as error:
            _logger.warning("the lease of training %s ends by itself: %s", self._values["run_id"], error)


@contextmanager
def hold_lease(transaction: Transaction, run_id: str, *, seconds: float, on_progress: Progress) -> Iterator[Lease]:
    """Hold the lease of a training for the block; who holds it already is waited for as long as a lease lasts.

    A holder that has ended on this machine is not waited for.

    Raises:
        TransientError: another process trains this.
        RemoteError: the database cannot be reached.
    """
    lease = _take(transaction, run_id, seconds, on_progress)
    ended = threading.Event()
    keeper = threading.Thread(target=lease._keep, args=(ended,), name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        ended.set()
        keeper.join()
        lease._release()


def _take(transaction: Transaction, run_id: str, seconds: float, on_progress: Progress) -> Lease:
    process = _process(os.getpid())
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    values = {"run_id": run_id, "holder": holder, "process": process, "seconds": seconds, "abandoned": None}
    give_up: float | None = None
    while True:
        with transaction() as execute:
            taken = execute(_TAKE, values)
            if taken:
                return Lease(transaction, run_id, int(taken[0]["token"]), seconds)
            other = execute("SELECT * FROM lora_training_leases WHERE training_run_id = :run_id", values)[0]
        if has_ended(other["process"]):
            values["abandoned"] = other["token"]
            continue
        if give_up is None:
            give_up = time.monotonic() + seconds + 2 * _POLL_SECONDS
            on_progress(ProgressEvent(f"waiting for {other['holder']}, which trains the same", 0, None, "seconds"))
        if time.monotonic() > give_up:
            raise TransientError(
                f"{other['holder']} trains this already",
                where=f"training {run_id}",
                remedy="Wait for it, or end it; run again, and a finished training is taken as it is",
            )
        time.sleep(min(_POLL_SECONDS, seconds))


def _process(pid: int) -> str:
    """A process's name that no other ever gets: boot, process namespace, number, start time; empty if it has ended.

    Empty too where the system has no ``/proc``.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        # proc(5): the state and the start time are fields 3 and 22; the name before them may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot} {namespace} {pid} {fields[19]}"


def has_ended(process: str) -> bool:
    """Whether a process of this machine, as named by `_process`, is no more; False for those of others."""
    ours = _process(os.getpid())
    if not process or not ours or process.split()[:2] != ours.split()[:2]:
        return False
    return _process(int(process.split()[2])) != process
