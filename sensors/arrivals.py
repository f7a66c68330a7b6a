"""What has arrived: a pure decision from what lies in the directory and from what earlier ticks saw."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from pydantic import BaseModel

from finetune.dataset.discovery import ExportFile, Listing, date_in_name, stat_fingerprint

# How a file is known to be complete, beside a marker ``NAME.done``: it stood still for two ticks, or its writer
# renames it into place, or by the marker alone.
Completeness = Literal["still", "rename", "marker"]

# Both bound the cursor, which Dagster sends along with every tick: 11 years of daily exports, and of the dates that
# are new or changed so many at a time, the newest first.
MAX_DATES = 4000
MAX_WATCHED = 200
# 48 bits tell two states of one date's files apart.
_DIGITS = 12


class Cursor(BaseModel):
    """What earlier ticks saw, as beginnings of fingerprints by date."""

    # of all files of a date, when a run was asked for
    requested: dict[str, str] = {}
    # of those files of a new or changed date that nothing vouched for in the tick before
    watched: dict[str, str] = {}

    def encode(self) -> str:
        """The cursor as text of at most 64 KB."""
        return base64.b64encode(zlib.compress(self.model_dump_json().encode(), 9)).decode()

    @classmethod
    def decode(cls, text: str | None) -> "Cursor":
        """The cursor of an earlier tick.

        One that cannot be read counts as none: then every date is asked for again, and Dagster, which knows
        the run keys, starts nothing twice.
        """
        try:
            return cls.model_validate_json(zlib.decompress(base64.b64decode(text or "")))
        except (ValueError, zlib.error):
            return cls()


@dataclass(frozen=True)
class Ready:
    """A date that a run is asked for; `files` are its own."""

    date: str
    fingerprint: str
    files: list[ExportFile]


@dataclass(frozen=True)
class Decision:
    """What one tick does."""

    cursor: Cursor
    # the newest first
    ready: list[Ready] = field(default_factory=list)
    # why a new or changed date, or a file whose date nobody knows, is not ready
    waiting: dict[str, str] = field(default_factory=dict)
    # dates that had files and have none now
    vanished: list[str] = field(default_factory=list)
    # dates that are older than the cursor can hold
    forgotten: int = 0
    # not one export is left: more like a volume that is not mounted than like a deletion
    emptied: bool = False


def decide(cursor: Cursor, listing: Listing, *, complete: Completeness, limit: int) -> Decision:
    """Decide for which dates a run is asked for.

    That is for each date whose files differ from those that a run was asked for, once all of them are complete
    and readable. A marker ``NAME.done`` that is not older than its file vouches for it at once; otherwise
    `complete` says what does. At most `limit` dates are ready in one tick, the newest first, and at most as many
    vanished ones are told; the others follow in the next ticks.

    Args:
        cursor: what earlier ticks saw.
        listing: what lies in the directory now.
        complete: how a file without a marker is known to be complete.
        limit: the most dates that may be ready in one tick.
    """
    if not listing.files and not listing.broken and cursor.requested:
        return Decision(cursor, emptied=True)
    files_of = {date: list(files) for date, files in groupby(listing.files, key=lambda file: file.date)}
    newest = sorted(files_of, reverse=True)[:MAX_DATES]
    fingerprints = {date: stat_fingerprint(files_of[date]) for date in newest}
    changed = [date for date in newest if cursor.requested.get(date) != fingerprints[date][:_DIGITS]]
    requested = {date: of for date, of in cursor.requested.items() if date not in files_of or date in fingerprints}

    waiting = {date_in_name(name) or name: f"{name} cannot be read: {why}" for name, why in listing.broken.items()}
    gone = sorted(date for date in requested if date not in files_of and date not in waiting)[:limit]
    ready: list[Ready] = []
    watched: dict[str, str] = {}
    for date in changed:
        unproven = [file for file in files_of[date] if not _vouched_for(file, listing, complete)]
        if hindrance := waiting.get(date) or _hindrance(files_of[date], unproven, listing, complete):
            waiting[date] = hindrance
        elif len(watched) < MAX_WATCHED:
            watched[date] = stat_fingerprint(unproven)[:_DIGITS]
            if unproven and cursor.watched.get(date) != watched[date]:
                waiting[date] = "new or still being written"
            elif len(ready) < limit:
                ready.append(Ready(date, fingerprints[date], files_of[date]))
    for each in ready:
        requested[each.date] = each.fingerprint[:_DIGITS]
    asked = {each.date for each in ready}
    return Decision(
        cursor=Cursor(
            requested=_newest({date: of for date, of in requested.items() if date not in gone}),
            watched={date: of for date, of in watched.items() if date not in asked},
        ),
        ready=ready,
        waiting=waiting,
        vanished=gone,
        forgotten=len(files_of) - len(newest),
    )


def _vouched_for(file: ExportFile, listing: Listing, complete: Completeness) -> bool:
    """Whether a file is complete at first sight; one that was written after its marker is another file."""
    return complete == "rename" or listing.done.get(file.name, -1) >= file.mtime_ns


def _hindrance(
    files: Sequence[ExportFile], unproven: Sequence[ExportFile], listing: Listing, complete: Completeness
) -> str | None:
    """Why a date cannot be ready, however long its files stand still."""
    for file in files:
        if why := listing.unreadable.get(file.name):
            return f"{file.name} cannot be read: {why}"
    if unproven and complete == "marker":
        return f"{unproven[0].name} has no marker .done, or an older one"
    return None


def _newest(dates: dict[str, str]) -> dict[str, str]:
    return {date: dates[date] for date in sorted(dates)[-MAX_DATES:]}


def told(waiting: dict[str, str], most: int = 20) -> Sequence[str]:
    """One line for each date that waits, but not thousands."""
    lines = [f"{date}: {why}" for date, why in list(waiting.items())[:most]]
    return lines if len(waiting) <= most else [*lines, f"... and {len(waiting) - most} more"]
