"""Errors of the project, in one tree.

```
FinetuneError
├── PermanentError          trying again cannot help: someone must change something
│   ├── ConfigurationError    a setting, a flag or a file of settings is wrong
│   ├── DatasetError          the exports cannot become a dataset
│   ├── BaseModelError        the base model is missing, unreachable or damaged
│   ├── TrainingError         the training itself went wrong (NaN, nothing to learn from)
│   ├── ExportError           merge, GGUF or a serving export failed
│   └── ArtifactError         a published artifact is missing, incomplete or altered
└── TransientError          trying again later may help
    ├── StorageFullError      the disk is full
    ├── StoppedError          the process was asked to end, and has saved what it had
    └── RemoteError           a server did not answer, or answered that it is busy
```

Every error says what went wrong, where, and what to do about it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class FinetuneError(Exception):
    """Base of all errors that the project raises on purpose.

    Args:
        what: what went wrong, in one sentence without a trailing full stop.
        where: the file, setting or address concerned.
        remedy: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str = "") -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Callable[..., FinetuneError], tuple[object, ...]]:
        # Errors of worker processes reach their parent as pickles.
        return _again, (type(self), self.what, self.where, self.remedy)

    def __str__(self) -> str:
        place = f" [{self.where}]" if self.where else ""
        advice = f". {self.remedy}" if self.remedy else ""
        return f"{self.what}{place}{advice}"


def _again(kind: type[FinetuneError], what: str, where: str | None, remedy: str) -> FinetuneError:
    return kind(what, where=where, remedy=remedy)


class PermanentError(FinetuneError):
    """Trying again cannot help."""


class ConfigurationError(PermanentError):
    """A setting, a flag or a file of settings is wrong."""


class DatasetError(PermanentError):
    """The exports cannot become a dataset."""


class BaseModelError(PermanentError):
    """The base model is missing, unreachable or damaged."""


class TrainingError(PermanentError):
    """The training itself went wrong."""


class ExportError(PermanentError):
    """Merge, GGUF or a serving export failed."""


class ArtifactError(PermanentError):
    """A published artifact is missing, incomplete or altered."""


class TransientError(FinetuneError):
    """Trying again later may help."""


class StorageFullError(TransientError):
    """The disk is full."""


class StoppedError(TransientError):
    """The process was asked to end, and has saved what it had."""


class RemoteError(TransientError):
    """A server did not answer, or answered that it is busy."""


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn ``ENOSPC`` and ``EDQUOT`` inside the block into `StorageFullError` naming `path`.

    Raises:
        StorageFullError: the block ran out of space.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                "no space left on the disk",
                where=path,
                remedy="Free space or enlarge the volume, then run again: nothing half-made was kept",
            ) from error
        raise
