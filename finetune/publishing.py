"""Atomic publication of directories, and their manifests.

A directory is complete if and only if its ``manifest.json`` exists. It is written to a sibling
temporary directory, every file is flushed to disk, the manifest comes last, and one rename makes it
visible. Whoever is killed half-way leaves only a temporary directory behind, which readers ignore.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.errors import ArtifactError, full_disk_named

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
TEMPORARY_MARK = ".tmp-"
# As `temporary_sibling` makes it.
_TEMPORARY_NAME = re.compile(rf"\..+{re.escape(TEMPORARY_MARK)}\d+-[0-9a-f]+", re.DOTALL)
# No writer pauses for so long.
_ABANDONED_SECONDS = 24 * 3600
_CHUNK = 1 << 20


class FileEntry(BaseModel):
    """One published file: its size in bytes and its SHA-256 in hexadecimal."""

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a published directory holds and what it was made from (format version 1)."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    kind: str
    created_at: datetime
    inputs: dict[str, Any] = Field(default_factory=dict)
    parameters: dict[str, Any] = Field(default_factory=dict)
    results: dict[str, Any] = Field(default_factory=dict)
    outputs: dict[str, FileEntry]


@dataclass
class Staging:
    """A directory being made: write files under `path`, fill in what the manifest shall say."""

    path: Path
    inputs: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    # SHA-256 by name of large files that were hashed while they were written
    digests: dict[str, str] = field(default_factory=dict)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str).encode()


def sha256_json(value: Any) -> str:
    """SHA-256 of `canonical_json` in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def is_complete(directory: Path) -> bool:
    """Whether `directory` was published whole."""
    return (directory / MANIFEST_NAME).is_file()


def read_manifest(
    directory: Path, *, kind: str | None = None, verify: Literal["sizes", "hashes"] = "sizes"
) -> Manifest:
    """Read and check the manifest of a published directory.

    Args:
        directory: the published directory.
        kind: the kind that is expected, if any.
        verify: compare the files' sizes only, or their SHA-256 too.

    Raises:
        ArtifactError: not published, of another kind, or a file is missing or altered.
    """
    path = directory / MANIFEST_NAME
    remedy = "Delete the directory and materialize the asset again"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(
            "no complete artifact here: manifest.json is missing", where=directory, remedy=remedy
        ) from error
    except ValidationError as error:
        raise ArtifactError(f"unreadable manifest: {error}", where=path, remedy=remedy) from error
    if manifest.schema_version > SCHEMA_VERSION:
        raise ArtifactError(
            f"manifest has schema version {manifest.schema_version}, this program knows {SCHEMA_VERSION}",
            where=path,
            remedy="Upgrade lora-assets",
        )
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"expected an artifact of kind {kind}, found {manifest.kind}", where=path, remedy=remedy)
    for name, entry in manifest.outputs.items():
        file = directory / name
        if not file.is_file():
            raise ArtifactError("a file of the artifact is missing", where=file, remedy=remedy)
        if file.stat().st_size != entry.size:
            raise ArtifactError(
                f"a file of the artifact has {file.stat().st_size} bytes instead of {entry.size}",
                where=file,
                remedy=remedy,
            )
        if verify == "hashes" and sha256_file(file) != entry.sha256:
            raise ArtifactError("a file of the artifact was altered: its SHA-256 differs", where=file, remedy=remedy)
    return manifest


def find_published(directory: Path, *, kind: str, inputs: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a whole artifact that was made from these inputs; None where there is none to use again."""
    try:
        manifest = read_manifest(directory, kind=kind)
    except ArtifactError:
        return None
    return manifest if manifest.inputs == inputs else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finish(staging: Staging, kind: str) -> Manifest:
    outputs: dict[str, FileEntry] = {}
    for file in sorted(staging.path.rglob("*")):
        if file.is_dir():
            file.chmod(0o755)
        else:
            # Libraries write some files with mode 0600; other users of a shared volume must read them.
            file.chmod(0o644)
            _sync(file)
            name = file.relative_to(staging.path).as_posix()
            outputs[name] = FileEntry(size=file.stat().st_size, sha256=staging.digests.get(name) or sha256_file(file))
    manifest = Manifest(
        kind=kind,
        created_at=datetime.now(UTC),
        inputs=staging.inputs,
        parameters=staging.parameters,
        results=staging.results,
        outputs=outputs,
    )
    path = staging.path / MANIFEST_NAME
    path.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    path.chmod(0o644)
    staging.path.chmod(0o755)
    _sync(path)
    _sync(staging.path)
    return manifest


def temporary_sibling(target: Path) -> Path:
    """A fresh hidden name beside `target`, for work that a rename will publish."""
    return target.with_name(f".{target.name}{TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}")


def _rename_to_new(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, "another writer was first", str(target)) from error
        raise


def _refuse_foreign(target: Path, kind: str) -> None:
    """Refuse to replace anything but an empty directory or an artifact of the same kind."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if is_complete(target):
        try:
            found = json.loads((target / MANIFEST_NAME).read_bytes())["kind"]
        except (ValueError, KeyError, TypeError):
            found = "unknown"
        if found == kind:
            return
        what = f"an artifact of kind {found} lies here, which a {kind} would replace"
    else:
        what = "files that are no artifact lie here, and would be lost"
    raise ArtifactError(what, where=target, remedy="Choose another directory, or delete this one")


def is_abandoned(path: Path) -> bool:
    """Whether a temporary file or directory was left by a writer that was killed: nothing in it changed for a day."""
    return bool(_TEMPORARY_NAME.fullmatch(path.name)) and seconds_unchanged(path) > _ABANDONED_SECONDS


def seconds_unchanged(path: Path) -> float:
    """How long nothing in a file or directory was written; 0 where somebody changes it while it is looked at."""
    try:
        newest = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return 0.0
    return time.time() - newest


def remove_abandoned(directory: Path, name: str) -> None:
    """Remove what killed writers left in `directory` beside targets whose names fit a pattern, a day later."""
    for left in directory.glob(f".{name}{TEMPORARY_MARK}*"):
        if is_abandoned(left):
            remove_tree(left)


def remove_tree(path: Path) -> None:
    """Remove a file or a directory; what others removed meanwhile, or may not be removed, is passed over."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def withdraw(directory: Path) -> None:
    """Remove a published directory: for readers at once, by a rename, and then from the disk.

    Whoever is killed in between leaves a temporary directory, which is removed a day later.
    """
    leaving = temporary_sibling(directory)
    directory.rename(leaving)
    remove_tree(leaving)


@contextmanager
def publish_directory(target: Path, *, kind: str, replace: bool = True) -> Iterator[Staging]:
    """Make `target` whole or not at all.

    Yields a `Staging` whose files become `target` when the block ends without an error. A complete
    `target` of the same kind that is there already is replaced; between the two renames a reader sees none.
    Without `replace` the rename decides which of several writers gets the name, on shared volumes too. What
    writers of `target` who were killed left beside it is removed a day later.

    Raises:
        ArtifactError: `target` is something else, which replacing would delete.
        FileExistsError: `replace` is off and another writer was first; nothing is left behind.
        StorageFullError: the disk is full; nothing is left behind.
    """
    if replace:
        _refuse_foreign(target, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, glob.escape(target.name))
    staging = Staging(temporary_sibling(target))
    with full_disk_named(target):
        try:
            staging.path.mkdir()
            yield staging
            _finish(staging, kind)
            if not replace:
                _rename_to_new(staging.path, target)
            elif target.exists():
                old = temporary_sibling(target)
                target.rename(old)
                staging.path.rename(target)
                shutil.rmtree(old)
            else:
                staging.path.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(staging.path, ignore_errors=True)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it, rename it.

    Raises:
        StorageFullError: the disk is full; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    with full_disk_named(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json_atomically(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """`write_bytes_atomically` of indented UTF-8 JSON."""
    write_bytes_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())
