"""Versions that went on from others: what an ancestor has learned, its descendants know."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from finetune.registry.models import RegisteredVersion
from finetune.registry.store import get_version


def ancestry(registry: Path, version: RegisteredVersion) -> Iterator[RegisteredVersion]:
    """A version, the one that it went on from, and so on.

    Raises:
        ArtifactError: an ancestor's manifest was altered.
    """
    found: RegisteredVersion | None = version
    while found is not None:
        yield found
        parent = _parent(found)
        found = get_version(registry, parent) if parent else None


def with_descendants(names: Collection[str], versions: Sequence[RegisteredVersion]) -> list[str]:
    """These versions and all that went on from them, in the order of `versions`, the oldest first."""
    found = set(names)
    for version in versions:
        if _parent(version) in found:
            found.add(version.version)
    return [version.version for version in versions if version.version in found]


def _parent(version: RegisteredVersion) -> str | None:
    return (version.lineage.get("continued") or {}).get("version")
