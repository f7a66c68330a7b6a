"""Finding the exports: which files there are, of which date, and what marks a change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from finetune.dataset.reading import opened
from finetune.errors import ConfigurationError, DatasetError
from finetune.publishing import sha256_file, sha256_json

# A date, whole or with six digits of time behind it.
_DATE = re.compile(r"(?<!\d)(20\d\d)([-_.]?)(\d\d)\2(\d\d)(?=\d{6}(?!\d)|\D|$)")
_WINDOW = re.compile(r"all|date|last:([1-9]\d*)")
_FINGERPRINT_DIGITS = 16


class ExportFile(BaseModel):
    """One file of exports, as it was when the directory was listed.

    `date` is an ISO date; `size` is in bytes, `mtime_ns` in nanoseconds since 1970.
    """

    model_config = ConfigDict(frozen=True)

    path: Path
    name: str
    date: str
    size: int
    mtime_ns: int


def date_in_name(name: str) -> str | None:
    """The first date in a file name as an ISO date, or None.

    ``2026-06-01``, ``2026_06_01``, ``2026.06.01`` and ``20260601`` are dates, whatever follows them,
    such as a time or a part's number.
    """
    for match in _DATE.finditer(name):
        try:
            return date(int(match[1]), int(match[3]), int(match[4])).isoformat()
        except ValueError:  # such as a 13th month
            continue
    return None


def discover_exports(directory: Path, pattern: str = "brain_dataset_*.jsonl") -> list[ExportFile]:
    """The exports in `directory` (not below it), sorted by date and name.

    A file whose name holds no date has the date of its last modification in UTC.

    Raises:
        DatasetError: there is no such directory, or it cannot be read.
    """
    return sorted(_exports(directory, pattern), key=lambda file: (file.date, file.name))


def _exports(directory: Path, pattern: str) -> Iterator[ExportFile]:
    try:
        # Path.glob takes a directory that it may not read for an empty one.
        entries = [path for path in directory.iterdir() if path.match(pattern)]
    except FileNotFoundError as error:
        raise DatasetError(
            "the directory of exports does not exist",
            where=directory,
            remedy="Create it, mount its volume, or point to another one",
        ) from error
    except OSError as error:
        raise DatasetError(
            f"the directory of exports cannot be read: {error.strerror}",
            where=directory,
            remedy="Check that it is a directory and that this user may list it",
        ) from error
    for path in entries:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # gone since the listing
        except OSError as error:
            raise DatasetError(
                f"an export cannot be read: {error.strerror}", where=path, remedy="Check its permissions"
            ) from error
        if path.is_file():
            modified = datetime.fromtimestamp(status.st_mtime, UTC).date().isoformat()
            yield ExportFile(
                path=path,
                name=path.name,
                date=date_in_name(path.name) or modified,
                size=status.st_size,
                mtime_ns=status.st_mtime_ns,
            )


def window_of(files: Sequence[ExportFile], date: str, window: str = "all") -> list[ExportFile]:
    """The files that a dataset date trains on.

    Args:
        files: exports of any dates.
        date: the dataset's ISO date.
        window: ``all`` up to and including the date, ``date`` for that one alone, or ``last:N`` for the
            last N dates with data up to it.

    Raises:
        ConfigurationError: `window` is none of these.
    """
    match = _WINDOW.fullmatch(window)
    if match is None:
        raise ConfigurationError(f"unknown window {window!r}", remedy="Use all, date or last:N, such as last:7")
    dates = sorted({file.date for file in files if file.date <= date})
    if window == "date":
        dates = [found for found in dates if found == date]
    elif match[1]:
        dates = dates[-int(match[1]) :]
    return sorted((file for file in files if file.date in set(dates)), key=lambda file: (file.date, file.name))


def stat_fingerprint(files: Sequence[ExportFile]) -> str:
    """A short hash of names, sizes and times: cheap, for sensors."""
    return sha256_json(sorted([file.name, file.size, file.mtime_ns] for file in files))[:_FINGERPRINT_DIGITS]


def content_fingerprint(files: Sequence[ExportFile]) -> str:
    """A short hash of names and contents: it reads every byte, for data versions.

    Raises:
        DatasetError: a file cannot be read.
        TransientError: a file has vanished.
    """
    hashes = []
    for file in files:
        with opened(file.path):
            hashes.append([file.name, sha256_file(file.path)])
    return sha256_json(sorted(hashes))[:_FINGERPRINT_DIGITS]
