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
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

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
from finetune.registry.models import Event, ExperimentManifest, RegisteredVersion, Status
from finetune.registry.provenance import describe_process

KIND = "registered_adapter"
EXPERIMENT_MANIFEST = "experiment_manifest.json"
_SCHEMA_VERSION = 1
_COLLECTED = "collected.json"
# What stays of a version whose weights were removed.
_KEPT = (_COLLECTED, EXPERIMENT_MANIFEST, MANIFEST_NAME)
_RESTORE = "Restore the version from a backup, or roll back to another one"
_VERSION_NAME = re.compile(r"v[1-9][0-9]*")


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

    Raises:
        ArtifactError: the adapter is incomplete, was altered, or is not the one of `adapter_hash`.
        StorageFullError: the disk is full; nothing is left behind.
    """
    outputs = _checked_files(adapter_path, adapter_hash)
    provenance = describe_process()
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
                experiment = ExperimentManifest(
                    version=name,
                    created_at=datetime.now(UTC),
                    adapter_hash=adapter_hash,
                    run_id=run_id,
                    trial_id=trial_id,
                    # As it will be read back, whatever mappings and paths the caller gave.
                    inputs=json.loads(canonical_json(lineage)),
                    adapter_config=read_adapter_config(adapter_path),
                    metrics=dict(metrics),
                    tags=dict(tags),
                    outputs=outputs,
                    **dict(provenance),
                )
                (staging.path / EXPERIMENT_MANIFEST).write_text(
                    experiment.model_dump_json(indent=2) + "\n", encoding="utf-8"
                )
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
        experiment = ExperimentManifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"unreadable experiment manifest of {name}: {error}", where=path, remedy=_RESTORE
        ) from error
    if experiment.version != name:
        raise ArtifactError(
            f"the directory {name} holds version {experiment.version}", where=directory, remedy="Give it its name back"
        )
    if experiment.schema_version > _SCHEMA_VERSION:
        raise ArtifactError(
            f"{name} has schema version {experiment.schema_version}, this program knows {_SCHEMA_VERSION}",
            where=path,
            remedy="Upgrade lora-assets",
        )
    status, reason = _status(directory, events)
    return RegisteredVersion(
        version=name,
        adapter_hash=experiment.adapter_hash,
        stored_path=directory,
        created_at=experiment.created_at,
        run_id=experiment.run_id,
        trial_id=experiment.trial_id,
        metrics=experiment.metrics,
        tags=experiment.tags,
        lineage=experiment.inputs,
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
