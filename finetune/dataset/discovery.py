"""Finding the exports: which files there are, of which date, and what marks a change."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from fnmatch import translate
from functools import lru_cache
from hashlib import sha256
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from finetune.dataset.reading import opened
from finetune.errors import ConfigurationError, DatasetError
from finetune.publishing import sha256_file, sha256_json

_DATE_AND_NAME = attrgetter("date", "name")
# A date, whole or with six digits of time behind it.
_DATE = re.compile(r"20(?<!\d20)(\d\d)([-_.]?)(\d\d)\2(\d\d)(?=\d{6}(?!\d)|\D|$)")
_WINDOW = re.compile(r"all|date|last:([1-9]\d*)")
_FINGERPRINT_DIGITS = 16
# Says that the export of that name before it is complete.
DONE = ".done"
# What programs call a file that they are still writing, whatever the pattern says.
_UNFINISHED = (".tmp", ".temp", ".part", ".partial", ".crdownload", ".swp", "~")


class ExportFile(NamedTuple):
    """One file of exports, as it was when the directory was listed.

    `date` is an ISO date; `size` is in bytes, `mtime_ns` in nanoseconds since 1970.
    """

    directory: Path
    name: str
    date: str
    size: int
    mtime_ns: int

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.directory / self.name


def date_in_name(name: str) -> str | None:
    """The first date in a file name as an ISO date, or None.

    ``2026-06-01``, ``2026_06_01``, ``2026.06.01`` and ``20260601`` are dates, whatever follows them,
    such as a time or a part's number.
    """
    for match in _DATE.finditer(name):
        if found := _iso_date(match[1], match[3], match[4]):
            return found
    return None


# A directory holds many files of one date.
@lru_cache(1 << 14)
def _iso_date(year: str, month: str, day: str) -> str | None:
    try:
        return date(2000 + int(year), int(month), int(day)).isoformat()
    except ValueError:  # such as a 13th month
        return None


@dataclass(frozen=True)
class Listing:
    """What one look at a directory of exports found."""

    # sorted by date and name
    files: list[ExportFile]
    # names of those of `files` that this user may not read, and why
    unreadable: dict[str, str]
    # names of exports of which not even size and time could be read, and why
    broken: dict[str, str]
    # when ``NAME.done`` was last written, in nanoseconds since 1970, by NAME
    done: dict[str, int]


def list_exports(directory: Path, pattern: str = "brain_dataset_*.jsonl") -> Listing:
    """Look at the exports in `directory` (not below it); no file is opened.

    A file whose name holds no date has the date of its last modification in UTC. Names that say that their
    file is being written (hidden, or ``.tmp``, ``.part`` and the like at the end) are passed over.

    Raises:
        DatasetError: there is no such directory, or it cannot be read.
    """
    matches = re.compile(translate(pattern)).match
    files, unreadable, broken, done = [], {}, {}, {}
    for entry in _entries(directory):
        name = entry.name.removesuffix(DONE)
        if not matches(name) or name.startswith(".") or name.endswith(_UNFINISHED):
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:
            # Gone since the listing, unless it is a link to a volume that is away.
            if entry.is_symlink() and name == entry.name:
                broken[name] = "what it links to is not there"
            continue
        except OSError as error:
            broken[name] = str(error.strerror)
            continue
        if not S_ISREG(status.st_mode):
            continue
        if name != entry.name:
            done[name] = status.st_mtime_ns
            continue
        found = date_in_name(name) or datetime.fromtimestamp(status.st_mtime, UTC).date().isoformat()
        files.append(ExportFile(directory, name, found, status.st_size, status.st_mtime_ns))
        if not os.access(entry.path, os.R_OK, effective_ids=True):
            unreadable[name] = "this user may not read it"
    files.sort(key=_DATE_AND_NAME)
    return Listing(files, unreadable, broken, done)


def discover_exports(directory: Path, pattern: str = "brain_dataset_*.jsonl") -> list[ExportFile]:
    """The exports in `directory`, as `list_exports` finds them, sorted by date and name.

    Raises:
        DatasetError: there is no such directory, or it or an export in it cannot be read.
    """
    listing = list_exports(directory, pattern)
    for name, why in listing.broken.items():
        raise DatasetError(f"an export cannot be read: {why}", where=directory / name, remedy="Check its permissions")
    return listing.files


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
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
    chosen = set(dates)
    return sorted((file for file in files if file.date in chosen), key=_DATE_AND_NAME)


class WindowStat(NamedTuple):
    """What tells windows apart without their files being opened: `stat_fingerprint`, and the size in bytes."""

    fingerprint: str
    size: int


def window_stats(files: Sequence[ExportFile], window: str = "all") -> dict[str, WindowStat]:
    """Fingerprint and size of the window of each date that has files, as `window_of` chooses it; by date.

    Each file is looked at once for each window that it is new in: with ``all``, which grows from date to date,
    once in all.

    Args:
        files: exports of any dates.
        window: as for `window_of`.

    Raises:
        ConfigurationError: `window` is none of these.
    """
    by_date = {day: list(of) for day, of in groupby(sorted(files, key=_DATE_AND_NAME), key=attrgetter("date"))}
    stats: dict[str, WindowStat] = {}
    if window == "all":
        digest, size = sha256(), 0
        for day, of in by_date.items():
            digest.update(_identity(of))
            size += sum(file.size for file in of)
            stats[day] = WindowStat(digest.hexdigest()[:_FINGERPRINT_DIGITS], size)
        return stats
    days = list(by_date)
    span = len(window_of([of[0] for of in by_date.values()], max(days, default=""), window))
    for at, day in enumerate(days):
        own = [file for each in days[max(0, at + 1 - span) : at + 1] for file in by_date[each]]
        stats[day] = WindowStat(stat_fingerprint(own), sum(file.size for file in own))
    return stats


def stat_fingerprint(files: Sequence[ExportFile]) -> str:
    """A short hash of names, sizes and times: cheap, for sensors."""
    return sha256(_identity(sorted(files, key=_DATE_AND_NAME))).hexdigest()[:_FINGERPRINT_DIGITS]


def _identity(files: Iterable[ExportFile]) -> bytes:
    # A name holds no slash, so that neither name nor number passes for another.
    return os.fsencode("".join([f"{file.name}/{file.size}/{file.mtime_ns}/" for file in files]))


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
