"""One start of one training: its directory, and whether its process lives.

The training's process holds a lock for as long as it lives, which the kernel drops however it ends. So
liveness needs no process id that could have been given to another process since, and a gateway that
was killed and started again knows it as well as the one before. Whoever starts a training takes the lock
first and leaves a record in it: a directory is trained in once, whoever tries.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_LOG_BYTES = 1 << 20


def machine() -> str:
    """Changes when the machine, or the container, is started again (Linux: boot and process 1)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    # Field 22 of proc_pid_stat(5), counted behind the name, which may hold anything.
    started = Path("/proc/1/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    return f"{boot}/{started}"


@dataclass(frozen=True)
class Record:
    """Who trains, or has trained: the leader of a process group, on which start of the machine."""

    pid: int
    machine: str


class Attempt:
    """The files of one start.

    Args:
        directory: where they lie.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.job = directory / "job.json"
        self.log = directory / "train.log"
        self.table = directory / "dataset.parquet"
        self.config = directory / "config.yaml"
        self.output = directory / "output"
        self._lock = directory / "train.lock"

    def take(self) -> bool:
        """Become the training's process; False where there is or was one. The lock lives on through exec."""
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(100):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # A gateway may just be looking.
                if self.record():
                    return False
                time.sleep(0.05)
        else:
            return False
        if self.record():
            return False
        os.write(descriptor, json.dumps(asdict(Record(os.getpid(), machine()))).encode())
        os.fsync(descriptor)
        os.set_inheritable(descriptor, True)
        return True

    def record(self) -> Record | None:
        """Who took it; None before somebody did."""
        try:
            return Record(**json.loads(self._lock.read_bytes()))
        except (FileNotFoundError, ValueError):
            return None

    def is_alive(self) -> bool:
        """Whether a process of the training lives."""
        try:
            descriptor = os.open(self._lock, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(descriptor)

    def is_orphaned(self) -> bool:
        """Whether only children of the training's process are left, such as its data loaders."""
        record = self.record()
        return record is not None and record.machine == machine() and not Path(f"/proc/{record.pid}").exists()

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the training's whole process group, if it lives."""
        record = self.record()
        if record and record.machine == machine() and self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(record.pid, number)

    def flags(self) -> dict[str, Any]:
        """H2O LLM Studio's ``flags.json``; empty where there is none."""
        try:
            flags = json.loads((self.output / "flags.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return flags if isinstance(flags, dict) else {}

    def log_lines(self, count: int) -> list[str]:
        """The last lines of what the training has said, of its last MiB."""
        try:
            with self.log.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - _LOG_BYTES))
                text = stream.read().decode(errors="replace")
        except FileNotFoundError:
            return []
        # A progress bar writes over its line; a NUL no text may hold.
        lines = [line.rpartition("\r")[2] for line in text.replace("\0", "").replace("\r\n", "\n").split("\n")]
        return [line for line in lines if line.strip()][-count:]
