"""Who reigns: promotion and rollback, each an entry of the history.

The history decides; ``champion.json`` repeats its last word for people and programs that read one file.
"""

from __future__ import annotations

import json
from pathlib import Path

from finetune.errors import ArtifactError
from finetune.publishing import write_json_atomically
from finetune.registry.history import append_event, read_events, reigns
from finetune.registry.models import Decision, Event, RegisteredVersion
from finetune.registry.store import get_version, list_versions

CHAMPION_POINTER = "champion.json"


def champion(registry: Path) -> RegisteredVersion | None:
    """The reigning version, or None before the first promotion.

    Raises:
        ArtifactError: the history or the version's manifest was altered.
    """
    stack = reigns(read_events(registry))
    return get_version(registry, stack[-1]) if stack else None


def promote(registry: Path, version: str, *, reason: str, by: str) -> RegisteredVersion:
    """Make a version champion; nothing changes if it reigns already.

    Args:
        registry: the registry's directory.
        version: ``v3``.
        reason: why, for the history.
        by: a person's name or a run's id, for the history.

    Raises:
        ArtifactError: there is no such version, or its weights were removed.
    """
    while True:
        events = read_events(registry)
        candidate = get_version(registry, version)
        reigning = _reigning(events)
        if reigning == version:
            return candidate
        if candidate.status == "collected":
            raise ArtifactError(
                f"{version} cannot be promoted: its weights were removed to free space",
                where=candidate.stored_path,
                remedy="Register the adapter again; it gets a new version",
            )
        try:
            append_event(registry, events, action="promote", version=version, replaced=reigning, reason=reason, by=by)
        except FileExistsError:
            continue
        return _settled(registry, version)


def rollback(registry: Path, *, reason: str, by: str) -> RegisteredVersion:
    """Make the version that reigned before the present champion champion again.

    Raises:
        ArtifactError: no version reigned before.
    """
    while True:
        events = read_events(registry)
        stack = reigns(events)
        if len(stack) < 2:
            raise ArtifactError(
                "there is nothing to roll back to: no version reigned before the present one",
                where=registry,
                remedy="Promote another version by its name",
            )
        earlier, present = stack[-2:]
        try:
            append_event(registry, events, action="rollback", version=earlier, replaced=present, reason=reason, by=by)
        except FileExistsError:
            continue
        return _settled(registry, earlier)


def settle(registry: Path, version: str, decision: Decision, *, by: str) -> RegisteredVersion:
    """Act on a decision: promote the version, or note why it stays challenger.

    The decision holds only while the champion that it was taken against still reigns. A version that
    reigned before returns by hand alone, so that running an old date again, or after a rollback, changes
    nothing. Settling the same decision twice adds nothing.

    Raises:
        ArtifactError: there is no such version.
    """
    while True:
        events = read_events(registry)
        current = get_version(registry, version)
        reigning = _reigning(events)
        if reigning == version:
            return current
        last = next((event for event in reversed(events) if version in (event.version, event.replaced)), None)
        refusal = _refusal(version, decision, reigning, events)
        if refusal is not None and last is not None and last.action == "refuse" and last.reason == refusal:
            return current
        try:
            if refusal is None:
                append_event(
                    registry,
                    events,
                    action="promote",
                    version=version,
                    replaced=reigning,
                    reason=decision.reason,
                    by=by,
                )
            else:
                append_event(registry, events, action="refuse", version=version, replaced=None, reason=refusal, by=by)
        except FileExistsError:
            continue
        return _settled(registry, version)


def rebuild(registry: Path) -> list[RegisteredVersion]:
    """Read all manifests and the history anew, and write ``champion.json`` from them.

    Raises:
        ArtifactError: a manifest or the history was altered.
    """
    versions = list_versions(registry)
    _write_pointer(registry)
    return versions


def pointed_at(registry: Path) -> str | None:
    """The version that ``champion.json`` names, or None where it is missing or unreadable."""
    try:
        version = json.loads((registry / CHAMPION_POINTER).read_bytes())["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(version)


def _reigning(events: list[Event]) -> str | None:
    stack = reigns(events)
    return stack[-1] if stack else None


def _refusal(version: str, decision: Decision, reigning: str | None, events: list[Event]) -> str | None:
    """Why a decision does not make the version champion, or None if it does."""
    if not decision.champion:
        return decision.reason
    moves = [event for event in events if event.action != "refuse" and version in (event.version, event.replaced)]
    if moves:
        last = moves[-1]
        return f"{last.version} took its place by {last.action} ({last.reason}), so only a person promotes it again"
    if reigning != decision.against:
        return (
            f"it was compared with {decision.against or 'no champion'} while {reigning or 'no champion'} reigns: "
            "evaluate it again"
        )
    return None


def _settled(registry: Path, version: str) -> RegisteredVersion:
    _write_pointer(registry)
    return get_version(registry, version)


def _write_pointer(registry: Path) -> None:
    written: list[Event] | None = None
    # A slower writer must not leave the pointer behind a faster one's entry: look again after writing.
    while (events := read_events(registry)) != written:
        stack = reigns(events)
        if stack:
            last = next(event for event in reversed(events) if event.action != "refuse")
            write_json_atomically(
                registry / CHAMPION_POINTER,
                {
                    "version": stack[-1],
                    "path": stack[-1],
                    "adapter_hash": get_version(registry, stack[-1]).adapter_hash,
                    "reason": last.reason,
                    "by": last.by,
                    "at": last.at.isoformat(),
                },
            )
        else:
            (registry / CHAMPION_POINTER).unlink(missing_ok=True)
        written = events
