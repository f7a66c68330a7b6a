"""A file that two threads of its own write and hash while the caller makes the next piece."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

# What fits into a core's cache is read, changed, hashed and written there.
PIECE = 1 << 20
_PIECES = 3
# Kept whole, a file of gigabytes would push what is still to be read out of the system's memory. And its pages would
# all be new: a virtual machine may have to ask its host for each, which more than doubles the time of a copy.
_CACHED_BYTES = 8 << 20


class HashedFile:
    """Writes a new file piece by piece; use as a context manager, then read `sha256`.

    A piece is a `buffer` that was filled and handed to `write`, or is gathered from what is handed to `append`.

    Args:
        path: the file, which is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._cached = 0
        self._buffers = deque(bytearray(PIECE) for _ in range(_PIECES))
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()
        self._gathered = memoryview(b"")
        self._free = self._gathered

    def __enter__(self) -> HashedFile:
        self._stream = self._path.open("wb", buffering=0)
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write_gathered()
                while self._pending:
                    self._finish_piece()
        finally:
            for thread in (self._hasher, self._writer):
                thread.shutdown(cancel_futures=True)
            self._stream.close()

    def buffer(self) -> memoryview:
        """`PIECE` bytes to fill and hand to `write`; waits until one is free.

        Raises:
            OSError: an earlier piece could not be written.
        """
        self._write_gathered()
        if len(self._pending) == _PIECES - 1:
            self._finish_piece()
        self._buffers.rotate()
        return memoryview(self._buffers[0])

    def write(self, piece: memoryview) -> None:
        """Write a part of the last `buffer`, which must not be touched afterwards."""
        self._pending.append((self._hasher.submit(self._digest.update, piece), self._writer.submit(self._write, piece)))

    def append(self, data: bytes) -> None:
        """Write `data`, of any length, after all that came before.

        Raises:
            OSError: an earlier piece could not be written.
        """
        rest = memoryview(data)
        while rest:
            if not self._free:
                self._gathered = self._free = self.buffer()
            size = min(len(rest), len(self._free))
            self._free[:size] = rest[:size]
            self._free, rest = self._free[size:], rest[size:]

    def _write_gathered(self) -> None:
        gathered = self._gathered[: len(self._gathered) - len(self._free)]
        self._gathered = self._free = memoryview(b"")
        if gathered:
            self.write(gathered)

    def _finish_piece(self) -> None:
        for part in self._pending.popleft():
            part.result()

    def _write(self, piece: memoryview) -> None:
        self._cached += len(piece)
        while piece:
            piece = piece[self._stream.write(piece) :]
        if self._cached >= _CACHED_BYTES and hasattr(os, "posix_fadvise"):
            # The system begins to put on the disk what is new, and frees the memory of what is there.
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._cached = 0

    @property
    def sha256(self) -> str:
        """SHA-256 of what was written, in hexadecimal."""
        return self._digest.hexdigest()
