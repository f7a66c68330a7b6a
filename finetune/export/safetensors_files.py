"""Safetensors files as they lie on disk: which tensors they hold, and where (format version 1)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import BaseModelError

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where the bytes of a tensor lie: `size` of them, from `offset` in `file` on, in safetensors' name of a type."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Names, types and places of a file's tensors.

    Raises:
        BaseModelError: the file is missing, cut short or no safetensors file.
    """
    remedy = "Download the base model again"
    if not path.is_file():
        raise BaseModelError("a file that the model's index names is missing", where=path, remedy=remedy)
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = stream.read(8)
        header_size = struct.unpack("<Q", length)[0] if len(length) == 8 else size
        if 8 + header_size > size:
            raise BaseModelError("not a whole safetensors file", where=path, remedy=remedy)
        try:
            header = json.loads(stream.read(header_size))
        except ValueError as error:
            raise BaseModelError(f"unreadable safetensors header: {error}", where=path, remedy=remedy) from error
    start = 8 + header_size
    tensors = {
        name: StoredTensor(
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
    if tensors and max(tensor.offset + tensor.size for tensor in tensors.values()) > size:
        raise BaseModelError("the safetensors file is cut short", where=path, remedy=remedy)
    return tensors


def safetensors_header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """The head of a file whose data are these tensors, one after the other: type, shape and bytes by name."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the file into memory, and numbers want to be aligned.
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content


def shard_paths(model_path: Path) -> list[Path]:
    """The safetensors files that hold a model in Hugging Face's layout, in name order; none if it has none.

    Raises:
        BaseModelError: the index is damaged.
    """
    # Where both are there, transformers reads the single file.
    single = model_path / "model.safetensors"
    if single.is_file():
        return [single]
    index = model_path / INDEX_NAME
    if not index.is_file():
        return []
    try:
        return sorted({model_path / name for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaseModelError(
            f"unreadable index of the model's files: {error!r}", where=index, remedy="Download the base model again"
        ) from error


def count_parameters(model_path: Path) -> int:
    """Elements of all tensors in a model's safetensors files."""
    return sum(
        math.prod(tensor.shape)
        for shard in shard_paths(model_path)
        for tensor in read_safetensors_header(shard).values()
    )
