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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from finetune.dataset.scan import RangeScan, RangeTask, scan_range
from finetune.errors import TransientError

_IN_FLIGHT_PER_WORKER = 2
_KEPT_BYTES = 31 << 20


# Validates ranges and gives the results in the order of the tasks.
Scanner = Callable[[Iterable[RangeTask]], Iterator[RangeScan]]


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
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    processes = [_start() for _ in range(workers)]
    for process in processes:
        idle.put(process)

    def scan(task: RangeTask) -> RangeScan:
        process = idle.get()
        try:
            return _ask(process, task)
        finally:
            idle.put(process)

    def scan_all(tasks: Iterable[RangeTask]) -> Iterator[RangeScan]:
        running: deque[Future[RangeScan]] = deque()
        for task in tasks:
            running.append(threads.submit(scan, task))
            if len(running) > workers * _IN_FLIGHT_PER_WORKER:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    threads = ThreadPoolExecutor(workers)
    try:
        yield scan_all
    finally:
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    program = f"import sys; sys.path[:] = {sys.path!r}; from finetune.dataset.workers import serve; serve()"
    # Threads of numpy's BLAS, which nothing here asks for, would spin on the cores that other workers need.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _ask(process: subprocess.Popen[bytes], task: RangeTask) -> RangeScan:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process was started without pipes")
    try:
        pickle.dump(task, process.stdin)
        process.stdin.flush()
        answer = pickle.load(process.stdout)  # noqa: S301 - our own process wrote it
    except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
        raise TransientError(
            f"a validating process ended early (exit status {process.poll()})",
            where=task.path,
            remedy="Run again; if it was killed for want of memory, use fewer workers",
        ) from error
    if isinstance(answer, BaseException):
        raise answer
    if not isinstance(answer, RangeScan):
        raise TypeError(answer)
    return answer


def _keep_freed_memory() -> None:
    """Have ranges read into memory that earlier ones have freed, not into new pages, which cost a fifth of the time.

    The GNU C library gives freed memory back to the system beyond a threshold, and raises that to the size of
    the largest block that was freed, up to 32 MiB (mallopt(3), ``M_MMAP_THRESHOLD``). This one is never touched.
    """
    bytes(_KEPT_BYTES)


def serve() -> None:
    """The process's life: tasks from standard input, results to standard output, until the input ends."""
    tasks, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Whatever a library may print must not fall between the results.
    os.dup2(2, 1)
    _keep_freed_memory()
    while True:
        try:
            task = pickle.load(tasks)  # noqa: S301 - our parent wrote it
        except EOFError:
            return
        answer: RangeScan | Exception
        try:
            answer = scan_range(task)
        except Exception as error:  # noqa: BLE001 - handed to the parent, which raises it
            answer = error
        pickle.dump(answer, results)
        results.flush()
