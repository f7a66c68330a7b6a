"""A request to end for a run in this process, also while it waits.

Dagster keeps SIGTERM and Ctrl-C for the code of its steps. Between them, while a run waits for a slot of a pool or
for the process that holds it, nobody would see them for as long as that takes.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dagster as dg

from lora_assets.cli.console import EXIT_TRANSIENT

_LOOKS, _SECONDS_BETWEEN_LOOKS = 3, 1.0


@contextmanager
def ends_while_it_waits(instance: dg.DagsterInstance, run_id: str, close: Callable[[str], None]) -> Iterator[None]:
    """End the process when it is asked to and no step of the run is there to see it.

    Args:
        instance: of the run, which is executed in the block, in the main thread.
        run_id: Dagster's.
        close: called with the reason before the process ends.
    """
    written, read = socket.socketpair()
    written.setblocking(False)
    # Whoever handles the signal, its number is written there as well.
    before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        if read.recv(1):
            idle = 0
            while idle < _LOOKS:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                idle = 0 if _works(instance, run_id) else idle + 1
            reason = "asked to end while no step was at work"
            close(reason)
            print(f"error: {reason}: run again", file=sys.stderr, flush=True)
            os._exit(EXIT_TRANSIENT)

    threading.Thread(target=watch, name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        written.close()


def _works(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether a step of the run is at work, or the run has ended and the process ends by itself."""
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return True
    steps = instance.get_run_step_stats(run_id)
    return any(step.status is not None and step.status.value == "IN_PROGRESS" for step in steps)
