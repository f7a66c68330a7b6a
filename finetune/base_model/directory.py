"""Checks and fingerprints of a model directory in Hugging Face's layout, without loading the model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from finetune.errors import BaseModelError
from finetune.publishing import sha256_file, sha256_json, write_json_atomically

_WHOLE = "Copy or download the model again, or point BASE_MODEL_NAME at a whole one"
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("spiece.model",))
# safetensors refuses longer headers too.
_LONGEST_HEADER = 100_000_000
# What belongs to a model beside its weights; a README or a log that changes is no other model.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BaseModelError(f"can't read a file of the base model: {error.strerror}", where=path, remedy=_WHOLE) from (
            error
        )
    except ValueError as error:
        raise BaseModelError(f"a file of the base model is not JSON: {error}", where=path, remedy=_WHOLE) from error
    if not isinstance(content, dict):
        raise BaseModelError("a file of the base model is not a JSON object", where=path, remedy=_WHOLE)
    return content


def _check_safetensors(path: Path) -> None:
    """Compare the header's offsets with the file's size (safetensors format 1: length, JSON, data)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _LONGEST_HEADER + 1
            header = json.loads(stream.read(length)) if length <= _LONGEST_HEADER else None
        if not isinstance(header, dict):
            raise ValueError("no header")
        expected = 8 + length + max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
    except OSError as error:
        raise BaseModelError(f"can't read a weight file: {error.strerror}", where=path, remedy=_WHOLE) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            "a weight file is damaged: its safetensors header is unreadable", where=path, remedy=_WHOLE
        ) from error
    if size != expected:
        raise BaseModelError(
            f"a weight file is damaged: it has {size} bytes, its header promises {expected}", where=path, remedy=_WHOLE
        )


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a model, by its index where there is one; safetensors before PyTorch's ``.bin``.

    Raises:
        BaseModelError: none there, or one that the index names is missing.
    """
    for index, pattern in (
        ("model.safetensors.index.json", "model*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (directory / index).exists():
            shards = _json_object(directory / index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise BaseModelError("the index of weights names no file", where=directory / index, remedy=_WHOLE)
            found = sorted({directory / str(name) for name in shards.values()})
            for file in found:
                if not file.is_file():
                    raise BaseModelError("a weight file is missing", where=file, remedy=_WHOLE)
            return found
        if found := sorted(directory.glob(pattern)):
            return found
    raise BaseModelError(
        "no weights: neither model.safetensors nor pytorch_model.bin, nor an index of shards",
        where=directory,
        remedy=_WHOLE,
    )


def check_model_directory(directory: Path, *, weights: bool = True) -> None:
    """See that a model is whole before minutes are spent on loading it.

    Raises:
        BaseModelError: names the file that is missing, truncated or unreadable.
    """
    config = directory / "config.json"
    if "model_type" not in _json_object(config):
        raise BaseModelError("the base model's configuration names no model_type", where=config, remedy=_WHOLE)
    if not any(all((directory / name).is_file() for name in names) for names in _TOKENIZERS):
        raise BaseModelError(
            "the base model has no tokenizer: neither tokenizer.json, tokenizer.model, nor vocab.json with merges.txt",
            where=directory,
            remedy=_WHOLE,
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (directory / name).exists():
            _json_object(directory / name)
    if weights:
        for file in weight_files(directory):
            if file.stat().st_size == 0:
                raise BaseModelError("a weight file is empty", where=file, remedy=_WHOLE)
            if file.suffix == ".safetensors":
                _check_safetensors(file)


def directory_fingerprint(directory: Path, *, cache_dir: Path, weights: bool = True) -> str:
    """SHA-256 over the names and contents of a model's files.

    Hashes are remembered in ``<cache_dir>/fingerprints`` by path, size and modification time: a model
    of 16 GB is read once.
    """
    small = {file for pattern in _SMALL_FILES for file in directory.glob(pattern)}
    large = set(weight_files(directory)) if weights else set()
    hashes: dict[str, str] = {}
    for file in sorted(small | large):
        status = file.stat()
        key = sha256_json([str(file.resolve()), status.st_size, status.st_mtime_ns])
        remembered = cache_dir / "fingerprints" / f"{key}.json"
        if file in large and remembered.is_file():
            hashes[file.name] = str(_json_object(remembered)["sha256"])
            continue
        hashes[file.name] = sha256_file(file)
        if file in large:
            write_json_atomically(remembered, {"path": str(file.resolve()), "sha256": hashes[file.name]})
    return sha256_json(hashes)
