"""Processes that validate ranges side by side.

They are plain programs fed over pipes: unlike the standard library's pools they never import their
parent's main module, may be started from any thread or process, and end when the parent does, however it
ends.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle

from finetune.dataset.scan import RangeScan, RangeTask, scan_range
from finetune.errors import TransientError

# Ranges that a worker has before it, so that none waits for its parent to read the answer before.
_AHEAD = 4
_KEPT_BYTES = 31 << 20


# Validates ranges and gives the results in the order of the tasks.
Scanner = Callable[[Iterable[RangeTask]], Iterator[RangeScan]]
_Process = subprocess.Popen[bytes]


@contextmanager
def scanning(workers: int) -> Iterator[Scanner]:
    """A scanner with this many processes; a single worker is this process itself.

    Raises:
        DatasetError: a file cannot be read.
        TransientError: a file has changed, or a process was killed.
    """
    if workers <= 1:
        _keep_freed_memory()
        yield lambda tasks: map(scan_range, tasks)
        return
    processes = [_start() for _ in range(workers)]
    try:
        yield partial(_scan_all, processes)
    finally:
        for process in processes:
            process.communicate()


def _scan_all(processes: Sequence[_Process], tasks: Iterable[RangeTask]) -> Iterator[RangeScan]:
    """Ranges are equally long: dealt out in turn, they keep all processes busy."""
    running: deque[tuple[_Process, RangeTask]] = deque()
    for process, task in zip(cycle(processes), tasks, strict=False):
        if len(running) == len(processes) * _AHEAD:
            yield _answer(*running.popleft())
        _send(process, task)
        running.append((process, task))
    while running:
        yield _answer(*running.popleft())


def _start() -> _Process:
    program = f"import sys; sys.path[:] = {sys.path!r}; from finetune.dataset.workers import serve; serve()"
    # Threads of numpy's BLAS, which nothing here asks for, would spin on the cores that other workers need.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _send(process: _Process, task: RangeTask) -> None:
    if process.stdin is None:
        raise RuntimeError("the process was started without pipes")
    try:
        pickle.dump(task, process.stdin)
        process.stdin.flush()
    except BrokenPipeError as error:
        raise _ended_early(process, task) from error


def _answer(process: _Process, task: RangeTask) -> RangeScan:
    if process.stdout is None:
        raise RuntimeError("the process was started without pipes")
    try:
        answer = pickle.load(process.stdout)  # noqa: S301 - our own process wrote it
    except (EOFError, pickle.UnpicklingError) as error:
        raise _ended_early(process, task) from error
    if isinstance(answer, BaseException):
        raise answer
    if not isinstance(answer, RangeScan):
        raise TypeError(answer)
    return answer


def _ended_early(process: _Process, task: RangeTask) -> TransientError:
    return TransientError(
        f"a validating process ended early (exit status {process.poll()})",
        where=task.path,
        remedy="Run again; if it was killed for want of memory, use fewer workers",
    )


def _keep_freed_memory() -> None:
    """Have ranges read into memory that earlier ones have freed, not into new pages, which cost a fifth of the time.

    The GNU C library gives freed memory back to the system beyond a threshold, and raises that to the size of
    the largest block that was freed, up to 32 MiB (mallopt(3), ``M_MMAP_THRESHOLD``). This one is never touched.
    """
    bytes(_KEPT_BYTES)


def serve() -> None:
    """The process's life: tasks from standard input, results to standard output, until the input ends."""
    results = os.fdopen(os.dup(1), "wb")
    # Whatever a library may print must not fall between the results.
    os.dup2(2, 1)
    _keep_freed_memory()
    tasks: queue.SimpleQueue[RangeTask | None] = queue.SimpleQueue()
    # Taken in at once: a parent that waits to be read, by a process that waits to be read, would wait forever.
    threading.Thread(target=_take_in, args=(tasks,), daemon=True).start()
    while (task := tasks.get()) is not None:
        answer: RangeScan | Exception
        try:
            answer = scan_range(task)
        except Exception as error:  # noqa: BLE001 - handed to the parent, which raises it
            answer = error
        pickle.dump(answer, results)
        results.flush()


def _take_in(tasks: queue.SimpleQueue[RangeTask | None]) -> None:
    stream = os.fdopen(os.dup(0), "rb")
    with suppress(EOFError, pickle.UnpicklingError):
        while True:
            tasks.put(pickle.load(stream))  # noqa: S301 - our parent wrote it
    tasks.put(None)
