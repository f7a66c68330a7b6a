"""The registry's history: numbered events that are only ever added, ``history/000001.json`` and on.

An event's file is written whole under another name, then hard-linked to its number: the link fails
if the number is taken, so that concurrent writers, also on a shared volume, agree on one order.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from finetune.errors import ArtifactError, full_disk_named
from finetune.publishing import temporary_sibling, write_bytes_atomically
from finetune.registry.models import Event

_DIRECTORY = "history"


def read_events(registry: Path) -> list[Event]:
    """All events, the oldest first.

    Raises:
        ArtifactError: an event was altered or removed.
    """
    events: list[Event] = []
    for path in sorted((registry / _DIRECTORY).glob("[0-9]*.json")):
        try:
            event = Event.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ArtifactError(
                f"unreadable entry of the registry's history: {error}",
                where=path,
                remedy="Restore the file from a backup of the data root",
            ) from error
        if event.number != len(events) + 1:
            raise ArtifactError(
                f"entry {len(events) + 1} of the registry's history is missing",
                where=path.parent,
                remedy="Restore the directory from a backup of the data root",
            )
        events.append(event)
    return events


def append_event(
    registry: Path,
    known: list[Event],
    *,
    action: Literal["promote", "rollback", "refuse"],
    version: str,
    replaced: str | None,
    reason: str,
    by: str,
) -> Event:
    """Add an event after those that the caller knows.

    Raises:
        FileExistsError: others were added meanwhile; read again and decide anew.
        StorageFullError: the disk is full.
    """
    event = Event(
        number=len(known) + 1,
        at=datetime.now(UTC),
        action=action,
        version=version,
        replaced=replaced,
        reason=reason,
        by=by,
    )
    path = registry / _DIRECTORY / f"{event.number:06d}.json"
    draft = temporary_sibling(path)
    write_bytes_atomically(draft, (event.model_dump_json(indent=2) + "\n").encode())
    try:
        with full_disk_named(path):
            os.link(draft, path)
    except FileExistsError:
        # A network file system may repeat a request whose answer was lost: then the link is ours.
        if draft.stat().st_nlink == 1:
            raise
    finally:
        draft.unlink()
    return event


def reigns(events: list[Event]) -> list[str]:
    """Versions that reigned, the reigning one last; a rollback takes off those above the one it restores."""
    stack: list[str] = []
    for event in events:
        if event.action == "promote":
            stack.append(event.version)
        elif event.action == "rollback":
            while stack and stack[-1] != event.version:
                stack.pop()
    return stack
