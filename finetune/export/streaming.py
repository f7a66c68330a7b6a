"""Merging LoRA tensor by tensor, with no whole model in memory.

Each shard is read, changed, hashed and written in pieces that fit into a core's cache: peak memory is one tensor's
update. The sum is taken in float32 and cast once, as peft does.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import SEEK_CUR, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import BaseModelError, ExportError
from finetune.export.adapter import LoraPair, Updates
from finetune.hashed_file import PIECE, HashedFile

if TYPE_CHECKING:
    import torch

# For float64, which no language model is published in, peft computes the update in float64 too.
_SAFETENSORS_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_safetensors_header(path: Path) -> dict[str, _Tensor]:
    """Names, types and places (absolute offsets) of a safetensors file's tensors (format version 1).

    Raises:
        BaseModelError: the file is cut short or no safetensors file.
    """
    remedy = "Download the base model again"
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
        name: _Tensor(
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


def shard_paths(model_path: Path) -> list[Path]:
    """The safetensors files that hold a model in Hugging Face's layout, in name order; none if it has none."""
    index = model_path / "model.safetensors.index.json"
    if index.is_file():
        return sorted({model_path / name for name in json.loads(index.read_bytes())["weight_map"].values()})
    single = model_path / "model.safetensors"
    return [single] if single.is_file() else []


def can_stream(model_path: Path, updates: Updates) -> bool:
    """Whether every update finds its tensor, by name, shape and type, in the model's safetensors files."""
    tensors: dict[str, _Tensor] = {}
    for shard in shard_paths(model_path):
        tensors.update(read_safetensors_header(shard))
    shapes = [tensor.shape for tensor in tensors.values()]
    tied = json.loads((model_path / "config.json").read_bytes()).get("tie_word_embeddings", False)

    def fits(name: str, shape: tuple[int, ...]) -> bool:
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype not in _SAFETENSORS_FLOATS or tensor.shape != shape or not shape:
            return False
        # A row is merged at a time at least.
        return tensor.size // shape[0] <= PIECE

    def pair_fits(module: str, pair: LoraPair) -> bool:
        shape = (pair.b.shape[0], pair.a.shape[1])
        if pair.fan_in_fan_out and pair.magnitude is not None:
            # DoRA's rows are columns here.
            return False
        return fits(f"{module}.weight", shape[::-1] if pair.fan_in_fan_out else shape)

    def replacement_fits(name: str, tensor: torch.Tensor) -> bool:
        shape = tuple(tensor.shape)
        # Replacing one of two tied tensors would replace the other too. Without one of its own, a head is tied.
        shared = any(part in name for part in ("embed", "wte", "lm_head")) and (tied or shapes.count(shape) < 2)
        return fits(name, shape) and not shared

    return (
        len(updates) > 0
        and all(pair_fits(module, pair) for module, pair in updates.pairs.items())
        and all(replacement_fits(name, tensor) for name, tensor in updates.replaced.items())
    )


def merge_streaming(
    model_path: Path, updates: Updates, output: Path, on_tensor: Callable[[int], Any]
) -> dict[str, str]:
    """Write the base's shards with an adapter's updates into `output`; returns each one's SHA-256 by its name.

    Call it only where `can_stream` holds. `on_tensor` is called with the number of merged tensors.

    Raises:
        BaseModelError: a shard is cut short.
        ExportError: a merged weight is not finite.
        OSError: the disk is full.
    """
    import torch

    digests = {}
    merged = 0
    scratch = torch.empty(max((pair.size for pair in updates.pairs.values()), default=0))
    for shard in shard_paths(model_path):
        tensors = sorted(read_safetensors_header(shard).items(), key=lambda item: item[1].offset)
        with shard.open("rb", buffering=0) as source, HashedFile(output / shard.name) as target:
            for name, tensor in tensors:
                pair = updates.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
                replacement = updates.replaced.get(name)
                if pair is None and replacement is None:
                    continue
                _copy(source, target, tensor.offset - source.tell())
                if replacement is not None:
                    finite = _replace(source, target, tensor, replacement)
                elif pair is not None:
                    finite = _add(source, target, tensor, pair, scratch)
                if not finite:
                    raise ExportError(
                        f"merging {name} gives numbers that are not finite",
                        where=shard,
                        remedy="The adapter is broken: train it again with a lower learning rate",
                    )
                merged += 1
                on_tensor(merged)
            _copy(source, target, shard.stat().st_size - source.tell())
        digests[shard.name] = target.sha256
    return digests


def _copy(source: FileIO, target: HashedFile, size: int) -> None:
    """Copy the next `size` bytes."""
    while size:
        piece = target.buffer()[:size]
        _fill(source, piece)
        target.write(piece)
        size -= len(piece)


def _add(source: FileIO, target: HashedFile, tensor: _Tensor, pair: LoraPair, scratch: torch.Tensor) -> bool:
    """Copy a tensor with the pair's update added; returns whether all of it is finite."""
    import torch

    dtype = getattr(torch, _SAFETENSORS_FLOATS[tensor.dtype])
    rows = PIECE // (tensor.size // tensor.shape[0])
    finite = True
    for number, delta in enumerate(pair.delta(scratch).split(rows)):
        piece = target.buffer()[: delta.numel() * dtype.itemsize]
        _fill(source, piece)
        weight = torch.frombuffer(piece, dtype=dtype).view(delta.shape)
        # Rounded once; both conversions are much faster than adding numbers of two types.
        merged = weight.float().add_(delta)
        if pair.magnitude is not None:
            length = pair.magnitude[number * rows :][: len(merged)] / torch.linalg.norm(merged, dim=1)
            merged.mul_(length[:, None])
        finite = _write(target, piece, weight.copy_(merged)) and finite
    return finite


def _replace(source: FileIO, target: HashedFile, tensor: _Tensor, replacement: torch.Tensor) -> bool:
    """Write `replacement` in the place of a tensor; returns whether all of it is finite."""
    import torch

    dtype = getattr(torch, _SAFETENSORS_FLOATS[tensor.dtype])
    finite = True
    for part in replacement.reshape(-1).split(PIECE // dtype.itemsize):
        piece = target.buffer()[: len(part) * dtype.itemsize]
        finite = _write(target, piece, torch.frombuffer(piece, dtype=dtype).copy_(part)) and finite
    source.seek(tensor.size, SEEK_CUR)
    return finite


def _write(target: HashedFile, piece: memoryview, weight: torch.Tensor) -> bool:
    """Write a piece that holds `weight`; returns whether all of it is finite."""
    import torch

    # One pass without a temporary: infinities and NaN survive a sum. Looked at before the thread has the piece.
    finite = bool(torch.isfinite(weight.sum(dtype=torch.float32)))
    target.write(piece)
    return finite


def _fill(source: FileIO, piece: memoryview) -> None:
    filled = 0
    while filled < len(piece):
        count = source.readinto(piece[filled:])
        if not count:
            raise BaseModelError(
                "the file ended while it was read", where=source.name, remedy="Download the base model again"
            )
        filled += count
