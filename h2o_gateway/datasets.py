"""Uploaded datasets: one directory each, named by the SHA-256 of its content."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from pathlib import Path

from finetune.publishing import TEMPORARY_MARK, is_complete, publish_directory, read_manifest
from h2o_gateway.conversion import count_records
from h2o_gateway.models import Dataset

KIND = "h2o_dataset"
_FILE = "dataset.jsonl"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Datasets:
    """The datasets under `directory`; what a killed gateway left half-uploaded is removed.

    Args:
        directory: where they lie.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._incoming = directory / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink()
        for unfinished in directory.glob(f".*{TEMPORARY_MARK}*"):
            shutil.rmtree(unfinished)

    def new_upload(self) -> Path:
        """A fresh file to write an upload to."""
        return self._incoming / f"{secrets.token_hex(8)}.jsonl"

    def path(self, identifier: str) -> Path | None:
        """The JSONL file of a dataset, or None where there is no such dataset."""
        directory = self._directory / identifier
        known = _SHA256.fullmatch(identifier) is not None and is_complete(directory)
        return directory / _FILE if known else None

    def keep(self, upload: Path, *, name: str, sha256: str) -> tuple[Dataset, bool]:
        """Check a whole upload and keep it; and whether it is new.

        Raises:
            DatasetError: it holds something else than records.
            StorageFullError: the disk is full.
        """
        directory = self._directory / sha256
        if is_complete(directory):
            return self._read(directory), False
        records = count_records(upload)
        # Somebody else may be first with the same file.
        with contextlib.suppress(FileExistsError), publish_directory(directory, kind=KIND, replace=False) as staging:
            upload.rename(staging.path / _FILE)
            staging.parameters = {"name": name}
            staging.results = {"records": records}
        return self._read(directory), True

    def _read(self, directory: Path) -> Dataset:
        manifest = read_manifest(directory, kind=KIND)
        entry = manifest.outputs[_FILE]
        return Dataset(
            id=directory.name,
            sha256=entry.sha256,
            name=manifest.parameters["name"],
            bytes=entry.size,
            records=manifest.results["records"],
        )
