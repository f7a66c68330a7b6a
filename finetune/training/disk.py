"""A full disk, also where a library hides it in an error of its own."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import StorageFullError


@contextmanager
def any_full_disk_named(path: Path) -> Iterator[None]:
    """Like `full_disk_named`, also where a library hides the system's error in one of its own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageFullError) or not _says_full(error):
            raise
        raise StorageFullError(
            "no space left on the disk",
            where=path,
            remedy="Free space or enlarge the volume, then run again: it goes on from the last checkpoint",
        ) from error


def _says_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and PyTorch's zip writer raise errors without errno.
    text = str(error)
    return "No space left on device" in text or "os error 28" in text or "PytorchStreamWriter failed" in text
