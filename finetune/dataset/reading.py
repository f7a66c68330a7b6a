"""Reading exports that someone else may still be writing: every byte is read against a hash.

A file is hashed once, whole and block by block. Whoever reads it again compares block by block, so that
nothing that has changed in between, however briefly, can reach the dataset.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest

from finetune.errors import DatasetError, TransientError


@dataclass(frozen=True)
class Fingerprint:
    """A file's content: its size, its SHA-256 in hexadecimal, and an XXH3 hash for every block.

    An empty file has one empty block.
    """

    size: int
    sha256: str
    block_bytes: int
    blocks: tuple[int, ...]


def changed(path: Path) -> TransientError:
    """The error for a file that is not what it was a moment ago."""
    return TransientError(
        "an export changed while it was read",
        where=path,
        remedy="Run again when it is written whole; exports should be written elsewhere and renamed into place",
    )


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open `path` for reading; yields the file descriptor.

    Raises:
        DatasetError: the file cannot be read.
        TransientError: it has vanished.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise TransientError(
            "an export has vanished", where=path, remedy="Run again: what is there then will be prepared"
        ) from error
    except (PermissionError, IsADirectoryError) as error:
        raise DatasetError(
            f"an export cannot be read: {error.strerror}",
            where=path,
            remedy="Check that it is a file and that this user may read it",
        ) from error


def read_exactly(descriptor: int, size: int, offset: int, path: Path) -> bytes:
    """`size` bytes from `offset`.

    Raises:
        TransientError: the file has become shorter than that.
    """
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise changed(path)
        data += more
    return data


def fingerprint_file(path: Path, *, size: int, mtime_ns: int, block_bytes: int) -> Fingerprint:
    """Hash a file that was listed with this size and modification time.

    Raises:
        DatasetError: the file cannot be read.
        TransientError: it has changed since it was listed, changes now, or has vanished.
    """
    digest = hashlib.sha256()
    blocks = []
    with opened(path) as descriptor:
        for offset in range(0, max(size, 1), block_bytes):
            block = read_exactly(descriptor, min(block_bytes, size - offset), offset, path)
            digest.update(block)
            blocks.append(xxh3_64_intdigest(block))
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
            raise changed(path)
    return Fingerprint(size=size, sha256=digest.hexdigest(), block_bytes=block_bytes, blocks=tuple(blocks))


def verified_blocks(path: Path, fingerprint: Fingerprint) -> Iterator[bytes]:
    """The file's blocks in order, each compared with its hash.

    Raises:
        DatasetError: the file cannot be read.
        TransientError: it has changed since it was hashed, or has vanished.
    """
    with opened(path) as descriptor:
        for number, expected in enumerate(fingerprint.blocks):
            offset = number * fingerprint.block_bytes
            block = read_exactly(descriptor, min(fingerprint.block_bytes, fingerprint.size - offset), offset, path)
            if xxh3_64_intdigest(block) != expected:
                raise changed(path)
            yield block
