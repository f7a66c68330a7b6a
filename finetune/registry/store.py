"""Immutable versions of adapters, ``v1``, ``v2``, ... in one directory; what lies there is the truth.

A version's number is won by a rename that fails if the name is taken. A writer tries only the number
after all those that it has seen, none of which holds its adapter: so there are no gaps, and the same
adapter never gets two versions, however many write at once, on shared volumes too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from finetune.adapter_files import adapter_hash as hash_adapter
from finetune.adapter_files import read_adapter_config
from finetune.errors import ArtifactError, full_disk_named
from finetune.publishing import (
    MANIFEST_NAME,
    FileEntry,
    canonical_json,
    is_complete,
    publish_directory,
    read_manifest,
    remove_abandoned,
    sha256_file,
    write_json_atomically,
)
from finetune.registry.history import read_events, reigns
from finetune.registry.models import Event, RegisteredVersion, Status
from finetune.reproduction.manifest import describe, write_manifest
from finetune.reproduction.models import EXPERIMENT_MANIFEST, SCHEMA_VERSION, Inputs, VersionManifest

KIND = "registered_adapter"
_COLLECTED = "collected.json"
# What stays of a version whose weights were removed.
_KEPT = (_COLLECTED, EXPERIMENT_MANIFEST, MANIFEST_NAME)
_RESTORE = "Restore the version from a backup, or roll back to another one"
_VERSION_NAME = re.compile(r"v[1-9][0-9]*")


class _Stated(BaseModel):
    """What the registry itself reads of a version's manifest; versions of all formats have it."""

    schema_version: int
    version: str
    created_at: datetime
    adapter_hash: str
    run_id: str
    trial_id: str
    inputs: Inputs
    metrics: dict[str, float]
    tags: dict[str, str]


def register_adapter(
    registry: Path,
    *,
    adapter_path: Path,
    adapter_hash: str,
    trial_id: str,
    run_id: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    lineage: Mapping[str, Any],
    evaluations: Sequence[Path] = (),
    exports: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    secrets: Sequence[str] = (),
) -> RegisteredVersion:
    """Keep an adapter as a new version, or return the version that it already is.

    Args:
        registry: the registry's directory, made on first use.
        adapter_path: the adapter in PEFT's layout, safetensors only.
        adapter_hash: its hash as training reported it (`finetune.adapter_files.adapter_hash`).
        trial_id: the trial that made it.
        run_id: the training's id.
        metrics: figures to show beside the version.
        tags: free text to search by.
        lineage: what it was made from, as JSON values: ``base_model``, ``base_model_fingerprint``,
            ``dataset_fingerprint``, ``plan``, ``seeds``, ``code_version`` and whatever else is known.
        evaluations: directories of its reports.
        exports: directory of the exports that its dataset was prepared from.
        environment: the settings in force that may be told, for the manifest.
        secrets: values that must not be told.

    Raises:
        ArtifactError: the adapter is incomplete, was altered, or is not the one of `adapter_hash`.
        StorageFullError: the disk is full; nothing is left behind.
    """
    outputs = _checked_files(adapter_path, adapter_hash)
    described = describe({adapter_path: evaluations}, exports=exports, environment=environment, secrets=secrets)
    # As it will be read back, whatever mappings and paths the caller gave.
    inputs = Inputs(**json.loads(canonical_json(lineage)), **dict(described.pop("inputs")))
    while True:
        versions = list_versions(registry)
        for known in versions:
            if known.adapter_hash == adapter_hash and known.status != "collected":
                return known
        name = f"v{versions[-1].number + 1 if versions else 1}"
        try:
            with publish_directory(registry / name, kind=KIND, replace=False) as staging:
                for file in outputs:
                    _link_or_copy(adapter_path / file, staging.path / file)
                manifest = VersionManifest(
                    version=name,
                    adapter_hash=adapter_hash,
                    run_id=run_id,
                    trial_id=trial_id,
                    inputs=inputs,
                    adapter_config=read_adapter_config(adapter_path),
                    metrics=dict(metrics),
                    tags=dict(tags),
                    outputs=outputs,
                    **described,
                )
                write_manifest(staging.path, manifest)
                staging.inputs = {"adapter_hash": adapter_hash}
        except FileExistsError:
            continue
        return get_version(registry, name)


def list_versions(registry: Path) -> list[RegisteredVersion]:
    """All versions, ``v1`` first, with the status that the history gives them.

    Raises:
        ArtifactError: a version's manifest or the history was altered.
    """
    if not registry.is_dir():
        return []
    events = read_events(registry)
    names = [path.name for path in registry.iterdir() if _VERSION_NAME.fullmatch(path.name) and is_complete(path)]
    return [_read(registry, name, events) for name in sorted(names, key=lambda name: int(name[1:]))]


def get_version(registry: Path, version: str) -> RegisteredVersion:
    """One version.

    Raises:
        ArtifactError: there is no such version, or its manifest was altered.
    """
    if not _VERSION_NAME.fullmatch(version) or not is_complete(registry / version):
        known = ", ".join(each.version for each in list_versions(registry)) or "none yet"
        raise ArtifactError(
            f"the registry has no version {version}", where=registry, remedy=f"Choose one of those it has: {known}"
        )
    return _read(registry, version, read_events(registry))


def verify_version(registry: Path, version: str) -> RegisteredVersion:
    """Hash every file of a version again.

    Raises:
        ArtifactError: there is no such version, a file is missing, altered or surplus, or the weights
            and the configuration no longer have the version's adapter hash.
    """
    found = get_version(registry, version)
    directory = found.stored_path
    if found.status == "collected":
        return found
    manifest = read_manifest(directory, kind=KIND, verify="hashes")
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    if surplus := sorted(present - set(manifest.outputs) - {MANIFEST_NAME}):
        raise ArtifactError(
            "a file was added to a registered version", where=directory / surplus[0], remedy="Remove the file"
        )
    actual = hash_adapter(directory)
    if not actual == found.adapter_hash == manifest.inputs.get("adapter_hash"):
        raise ArtifactError(
            f"the adapter's hash is {actual} instead of {found.adapter_hash}", where=directory, remedy=_RESTORE
        )
    return found


def find_garbage(registry: Path, *, keep: int) -> list[RegisteredVersion]:
    """The old challengers whose weights `collect_garbage` would remove: those before the newest `keep` versions."""
    if keep < 1:
        raise ValueError("keep must be at least 1")
    return [version for version in list_versions(registry)[:-keep] if version.status == "challenger"]


def size_on_disk(version: RegisteredVersion) -> int:
    """Bytes that removing the version's weights would free: what is linked from elsewhere too stays on the disk."""
    files = [path.stat() for path in version.stored_path.rglob("*") if path.is_file() and path.name not in _KEPT]
    return sum(stat.st_size for stat in files if stat.st_nlink == 1)


def collect_garbage(registry: Path, *, keep: int, by: str) -> list[str]:
    """Remove the weights of old challengers; their manifests stay, so that no number is used twice.

    The newest `keep` versions stay, and so does every version that reigns or that a rollback can reach.

    Args:
        registry: the registry's directory.
        keep: how many of the newest versions to leave alone, at least 1.
        by: who asks for it.

    Returns:
        The versions whose weights were removed.
    """
    garbage = find_garbage(registry, keep=keep)
    remove_abandoned(registry, "v*")
    for version in garbage:
        write_json_atomically(version.stored_path / _COLLECTED, {"at": datetime.now(UTC).isoformat(), "by": by})
    # The mark comes first: whoever is killed in between is finished by the next collection.
    for version in list_versions(registry):
        if version.status != "collected":
            continue
        if version.version in reigns(read_events(registry)):
            # Promoted meanwhile.
            (version.stored_path / _COLLECTED).unlink()
            continue
        for path in version.stored_path.iterdir():
            if path.name not in _KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [each.version for each in garbage if get_version(registry, each.version).status == "collected"]


def _checked_files(adapter_path: Path, adapter_hash: str) -> dict[str, FileEntry]:
    if is_complete(adapter_path):
        outputs = read_manifest(adapter_path, verify="hashes").outputs
    else:
        outputs = {
            path.relative_to(adapter_path).as_posix(): FileEntry(size=path.stat().st_size, sha256=sha256_file(path))
            for path in sorted(adapter_path.rglob("*"))
            if path.is_file()
        }
    actual = hash_adapter(adapter_path)
    if actual != adapter_hash:
        raise ArtifactError(
            f"the adapter's hash is {actual}, not {adapter_hash} as training reported",
            where=adapter_path,
            remedy="Train the adapter again",
        )
    return outputs


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(target):
        try:
            os.link(source, target)
        except OSError:
            # Another file system, or one without hard links.
            shutil.copyfile(source, target)


def _read(registry: Path, name: str, events: list[Event]) -> RegisteredVersion:
    directory = registry / name
    path = directory / EXPERIMENT_MANIFEST
    try:
        stated = _Stated.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"unreadable experiment manifest of {name}: {error}", where=path, remedy=_RESTORE
        ) from error
    if stated.version != name:
        raise ArtifactError(
            f"the directory {name} holds version {stated.version}", where=directory, remedy="Give it its name back"
        )
    if stated.schema_version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{name} has schema version {stated.schema_version}, this program knows {SCHEMA_VERSION}",
            where=path,
            remedy="Upgrade lora-assets",
        )
    status, reason = _status(directory, events)
    return RegisteredVersion(
        version=name,
        adapter_hash=stated.adapter_hash,
        stored_path=directory,
        created_at=stated.created_at,
        run_id=stated.run_id,
        trial_id=stated.trial_id,
        metrics=stated.metrics,
        tags=stated.tags,
        lineage=stated.inputs.lineage,
        status=status,
        reason=reason,
    )


def _status(directory: Path, events: list[Event]) -> tuple[Status, str]:
    name = directory.name
    own = [event for event in events if name in (event.version, event.replaced)]
    if (directory / _COLLECTED).is_file():
        return "collected", "its weights were removed to free space"
    if not own:
        return "challenger", "not yet compared with the champion"
    last = own[-1]
    if reigns(events)[-1:] == [name]:
        return "champion", last.reason
    reigned = any(event.action != "refuse" for event in own)
    reason = last.reason if last.action == "refuse" else f"{last.version} took its place: {last.reason}"
    return "retired" if reigned else "challenger", reason
