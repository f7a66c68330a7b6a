"""Whether this process is still the one that may train: what a training asks before it writes."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import ConfigurationError, TransientError

# False as soon as another process has taken the training over.
StillMine = Callable[[], bool]


def always_mine() -> bool:
    """For trainings that nobody else can know of."""
    return True


def refuse_if_taken_over(still_mine: StillMine, where: Path) -> None:
    """See that nobody has taken the training over, before a checkpoint or the adapter is written.

    Raises:
        TransientError: another process has.
    """
    if not still_mine():
        raise TransientError(
            "another process has taken this training over, so this one stops without writing anything",
            where=where,
            remedy="Nothing needs doing: the other one goes on from the last checkpoint",
        )


@contextmanager
def hold_output(output: Path) -> Iterator[None]:
    """Keep other processes from training into a directory for the block, without a database.

    The lock is the system's, on a file in the hidden sibling ``.<output>.work``: it ends with its holder, however
    that ends. Other machines see it where their volume passes locks on (NFS 4, CephFS).

    Raises:
        TransientError: another process holds it.
        ConfigurationError: the volume has no locks.
    """
    path = output.with_name(f".{output.name}.work") / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise TransientError(
                f"{stream.read() or 'another process'} trains into this directory already",
                where=output,
                remedy="Wait for it, or end it; run again, and a finished training is taken as it is",
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"no lock can be had here, so that two could train into this directory: {error.strerror}",
                where=output,
                remedy="Name an output on a volume with locks (NFS 4, CephFS, a disk of this machine)",
            ) from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield
