"""The finished adapter as one file for the download."""

from __future__ import annotations

import zipfile
from pathlib import Path

from finetune.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_hash
from finetune.errors import TrainingError
from finetune.publishing import sha256_file, temporary_sibling

FOLDER = "adapter_model"
LOG_NAME = "training_log.jsonl"
_CHUNK = 1 << 20


def write_archive(target: Path, output: Path, log: bytes) -> tuple[str, int]:
    """Make `target` a zip of the adapter in H2O LLM Studio's `output`; returns its SHA-256 and size.

    The same adapter gives the same bytes. `target` appears whole or not at all.

    Raises:
        TrainingError: there is no adapter in PEFT's layout.
        ArtifactError: it is damaged.
    """
    directory = output / FOLDER
    files = [directory / name for name in (CONFIG_NAME, WEIGHTS_NAME)]
    for file in files:
        if not file.is_file() or file.is_symlink() or directory.is_symlink():
            raise TrainingError(
                f"H2O LLM Studio says that it has finished, but {FOLDER}/{file.name} is missing", where=directory
            )
    adapter_hash(directory)
    temporary = temporary_sibling(target)
    try:
        # Weights hardly become smaller.
        with temporary.open("wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as zipped:
            for file in files:
                with file.open("rb") as source, zipped.open(_entry(file.name), "w", force_zip64=True) as entry:
                    while piece := source.read(_CHUNK):
                        entry.write(piece)
            zipped.writestr(_entry(LOG_NAME), log)
        digest, size = sha256_file(temporary), temporary.stat().st_size
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return digest, size


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(f"{FOLDER}/{name}")
    entry.external_attr = 0o100644 << 16
    return entry
