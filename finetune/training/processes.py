"""A training in several processes: torchrun starts them, and they report to the process that asked for it.

Each worker has a connection to its parent, over a unix socket in a private directory: from there it gets the
request, and there it tells of progress, asks whether the training is still ours, and says why it failed. A
worker whose parent has died notices at its next word and ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from finetune.errors import ConfigurationError, FinetuneError, TransientError
from finetune.progress import Progress, ProgressEvent
from finetune.training.models import Nodes, TrainingRequest
from finetune.training.monitor import stop_on_sigterm
from finetune.training.ownership import StillMine

_POLL_SECONDS = 0.2


def refuse_wrong_split(effective_batch: int, processes: int, nodes: int = 1) -> None:
    """See that every process gets the same share of an optimizer step, and a GPU of its own where there are any.

    Args:
        effective_batch: records of an optimizer step.
        processes: on each node.
        nodes: how many there are.

    Raises:
        ConfigurationError: it does not.
    """
    import torch

    gpus = torch.cuda.device_count()
    if gpus and processes > gpus:
        raise ConfigurationError(
            f"{processes} processes on {gpus} GPUs", where="TRAIN_PROCESSES", remedy="One process a GPU, at most"
        )
    if effective_batch % (processes * nodes):
        raise ConfigurationError(
            f"{effective_batch} records a step cannot be shared by {processes * nodes} processes",
            where="TRAIN_PROCESSES",
            remedy="Plan an effective batch (MICRO_BATCH times ACCUMULATION) that is a multiple of their number",
        )


def train_in_processes(
    request: TrainingRequest, processes: int, micro_batch: int, *, on_progress: Progress, still_mine: StillMine
) -> None:
    """Train in `processes` workers until the adapter is published.

    Raises:
        FinetuneError: what the first worker that failed said.
        TransientError: the workers were killed.
        torch.OutOfMemoryError: a worker's memory ran out.
    """
    with (
        # The path of a unix socket must be short, however deep TMPDIR is.
        tempfile.TemporaryDirectory(prefix="lora-", dir="/tmp") as directory,
        Listener(str(Path(directory) / "socket"), family="AF_UNIX") as listener,
        stop_on_sigterm() as stop,
    ):
        torchrun = [sys.executable, "-m", "torch.distributed.run", *_rendezvous(request.nodes)]
        torchrun.append(f"--nproc-per-node={processes}")
        launcher = subprocess.Popen([*torchrun, "-m", "finetune.training.worker", str(listener.address)])
        parent = _Parent((request.model_dump_json(), micro_batch), on_progress, still_mine)
        threading.Thread(target=parent.accept, args=(listener, processes), daemon=True).start()
        try:
            while launcher.poll() is None:
                parent.listen(_POLL_SECONDS)
                if stop.requested:
                    # Past torchrun, which would soon kill workers that save a checkpoint.
                    parent.stop_workers()
            parent.listen(0)
        finally:
            launcher.kill()
            launcher.wait()
            parent.close()
    if parent.failure is not None:
        raise parent.failure
    if launcher.returncode:
        # Killed, or told to end before there was anything to save: what a training in one process would not survive.
        raise TransientError(
            f"the {processes} processes of the training ended with status {launcher.returncode}",
            where=request.work_dir,
            remedy="Run again: it goes on from the last checkpoint; what the processes said is in the log above",
        )


def _rendezvous(nodes: Nodes | None) -> list[str]:
    """How torchrun finds the other nodes."""
    if nodes is None:
        return ["--standalone"]
    where = [f"--master-addr={nodes.master_addr}", f"--master-port={nodes.master_port}"]
    return [f"--nnodes={nodes.count}", f"--node-rank={nodes.rank}", *where]


class _Parent:
    """The end of the workers' connections."""

    def __init__(self, task: tuple[str, int], on_progress: Progress, still_mine: StillMine) -> None:
        self.failure: Exception | None = None
        self._task = task
        self._on_progress = on_progress
        self._still_mine = still_mine
        self._workers: dict[Connection[Any, Any], int] = {}
        self._told: set[int] = set()

    def accept(self, listener: Listener, processes: int) -> None:
        """Take in all workers, in a thread of its own."""
        for _ in range(processes):
            try:
                worker = listener.accept()
                pid = worker.recv()
                worker.send(self._task)
            except (OSError, EOFError):
                return
            self._workers[worker] = pid

    def listen(self, seconds: float) -> None:
        """Answer what workers say within that time."""
        ready = wait(list(self._workers), seconds)
        for worker in [each for each in list(self._workers) if each in ready]:
            try:
                kind, content = worker.recv()
            except (OSError, EOFError):
                del self._workers[worker]
                continue
            if kind == "progress":
                self._on_progress(content)
            elif kind == "still mine":
                worker.send(self._answer())
            elif self.failure is None:
                self.failure = content

    def _answer(self) -> bool:
        try:
            return self._still_mine()
        except FinetuneError as error:
            self.failure = error
            return False

    def stop_workers(self) -> None:
        """Ask every worker once to save a checkpoint and end; those that come later, when they have come."""
        for pid in set(self._workers.values()) - self._told:
            self._told.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def close(self) -> None:
        """Let go of the connections; workers that still run end at their next word."""
        for worker in list(self._workers):
            worker.close()


class Worker:
    """A worker's end of the connection to its parent."""

    def __init__(self, address: str) -> None:
        self._connection = Client(address, family="AF_UNIX")
        self._connection.send(os.getpid())
        content, self.micro_batch = self._connection.recv()
        self.request = TrainingRequest.model_validate_json(content)

    def progress(self, event: ProgressEvent) -> None:
        """Pass a report on."""
        self._connection.send(("progress", event))

    def still_mine(self) -> bool:
        """Have the parent ask."""
        self._connection.send(("still mine", None))
        return bool(self._connection.recv())

    def failed(self, error: Exception) -> None:
        """Say why this worker ends."""
        self._connection.send(("failed", error))
