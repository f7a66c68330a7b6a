"""Unpacking an adapter that came from elsewhere, trusting nothing in it."""

import json
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from finetune.errors import TrainingError, full_disk_named
from resources.h2o.protocol import Limits

LOG_NAME = "training_log.jsonl"
# What an adapter in PEFT's layout and what comes with it may be; pickles (.bin, .pt, .pth) run code when loaded.
_SUFFIXES = frozenset({".safetensors", ".json", ".jsonl", ".md", ".txt", ".jinja"})
_KEPT = (WEIGHTS_NAME, CONFIG_NAME, LOG_NAME)
_CHUNK = 1 << 20


def unpack_adapter(archive: Path, directory: Path, limits: Limits) -> None:
    """Write the adapter's weights, its configuration and its training log into `directory`.

    The whole archive is looked through first; one entry that an adapter cannot have spoils it all.

    Raises:
        TrainingError: no zip archive, a hostile or forbidden entry, too much, damaged, or no adapter in it.
        StorageFullError: the disk is full.
    """
    try:
        with zipfile.ZipFile(archive) as zipped, full_disk_named(directory):
            entries = [entry for entry in zipped.infolist() if not entry.is_dir()]
            _check(archive, entries, limits)
            home = _home(archive, entries)
            budget = limits.unpacked_bytes
            for entry in entries:
                place = PurePosixPath(entry.filename)
                if place.parent == home and place.name in _KEPT:
                    budget -= _extract(zipped, entry, directory / place.name, budget, archive)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise _refused(archive, f"the archive is damaged: {error}") from error


def safe_config(directory: Path) -> dict[str, Any]:
    """The unpacked ``adapter_config.json``.

    Raises:
        TrainingError: not a JSON object, or it makes PEFT import a module of the sender's choice.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"the adapter's configuration is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise _refused(path, "the adapter's configuration is no JSON object")
    if config.get("auto_mapping"):
        raise _refused(path, "the adapter's configuration names modules to import (auto_mapping)")
    return config


def _check(archive: Path, entries: list[zipfile.ZipInfo], limits: Limits) -> None:
    if len(entries) > limits.files:
        raise _refused(archive, f"{len(entries)} files, over the limit of {limits.files}")
    total = sum(entry.file_size for entry in entries)
    if total > limits.unpacked_bytes:
        raise _refused(archive, f"{total} bytes unpacked, over the limit of {limits.unpacked_bytes}")
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise _refused(archive, "two files of one name")
    for entry in entries:
        path = PurePosixPath(entry.filename)
        shown = repr(entry.filename[:100])
        # ZipInfo has cut the name at a NUL already; the drive's colon and backslash are for other systems.
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename:
            raise _refused(archive, f"the file name {shown} leads out of the directory")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise _refused(archive, f"{shown} is a link or a device")
        if entry.flag_bits & 1:
            raise _refused(archive, f"{shown} is encrypted")
        if path.suffix.lower() not in _SUFFIXES:
            raise _refused(archive, f"{shown} is of a kind that no safetensors adapter has")


def _home(archive: Path, entries: list[zipfile.ZipInfo]) -> PurePosixPath:
    """The one directory in the archive that holds an adapter."""
    paths = [PurePosixPath(entry.filename) for entry in entries]
    homes = {path.parent for path in paths if path.name == CONFIG_NAME}
    complete = [home for home in homes if home / WEIGHTS_NAME in paths]
    if len(complete) != 1:
        raise _refused(archive, f"{len(complete)} directories with {WEIGHTS_NAME} and {CONFIG_NAME}, instead of one")
    return complete[0]


def _extract(zipped: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, budget: int, archive: Path) -> int:
    # The size in the directory is the sender's word: count what comes out.
    written = 0
    with zipped.open(entry) as source, target.open("xb") as file:
        while piece := source.read(_CHUNK):
            written += len(piece)
            if written > min(budget, entry.file_size):
                raise _refused(archive, f"{entry.filename[:100]!r} is larger than announced")
            file.write(piece)
    return written


def _refused(where: Path, what: str) -> TrainingError:
    return TrainingError(
        f"the H2O server's adapter is refused: {what}",
        where=where,
        remedy="Look at the experiment on the server; the archive is kept for you to inspect",
    )
