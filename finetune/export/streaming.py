"""Merging tensor by tensor, with no whole model in memory.

Each tensor is read, changed, hashed and written in pieces that fit into a core's cache: peak memory is one tensor's
update. The sum is taken in float32 and cast once, as peft does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import BaseModelError, ExportError
from finetune.export.merge_plan import FLOAT_TYPES, MergedTensor, MergePlan
from finetune.export.safetensors_files import INDEX_NAME, safetensors_header
from finetune.hashed_file import PIECE, HashedFile

if TYPE_CHECKING:
    import torch


def merge_streaming(plan: MergePlan, output: Path, on_tensor: Callable[[int], Any]) -> dict[str, str]:
    """Write the shards of a plan, and their index where there are several, into `output`.

    `on_tensor` is called with the number of changed tensors. Returns each shard's SHA-256 by its name.

    Raises:
        BaseModelError: a shard is cut short.
        ExportError: a merged weight is not finite.
        OSError: the disk is full.
    """
    import torch

    digests = {}
    done = 0
    every = [tensor for shard in plan.shards.values() for tensor in shard.values()]
    scratch = torch.empty(max((math.prod(tensor.source.shape) for tensor in every if tensor.change), default=0))
    for shard, tensors in plan.shards.items():
        with HashedFile(output / shard) as target:
            target.append(
                safetensors_header(
                    {name: (tensor.dtype, tensor.source.shape, tensor.size) for name, tensor in tensors.items()}
                )
            )
            for name, tensor in tensors.items():
                if tensor.copied:
                    with tensor.source.file.open("rb", buffering=0) as source:
                        source.seek(tensor.source.offset)
                        _copy(source, target, tensor.size)
                elif not _merge(tensor, target, scratch):
                    raise ExportError(
                        f"merging {name} gives numbers that are not finite",
                        where=tensor.source.file,
                        remedy="The adapter is broken: train it again with a lower learning rate",
                    )
                if tensor.changed:
                    done += 1
                    on_tensor(done)
        digests[shard] = target.sha256
    if len(plan.shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(tensor.source.shape) for tensor in every),
                "total_size": sum(tensor.size for tensor in every),
            },
            "weight_map": {name: shard for shard, tensors in plan.shards.items() for name in tensors},
        }
        (output / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return digests


def _copy(source: FileIO, target: HashedFile, size: int) -> None:
    """Copy the next `size` bytes."""
    while size:
        piece = target.buffer()[:size]
        _fill(source, piece)
        target.write(piece)
        size -= len(piece)


def _merge(tensor: MergedTensor, target: HashedFile, scratch: torch.Tensor) -> bool:
    """Write a tensor with its change made; returns whether all of it is finite."""
    import torch

    dtype = getattr(torch, FLOAT_TYPES[tensor.dtype])
    merge = tensor.change.merger(scratch, lambda: _rows(tensor)) if tensor.change else None
    finite = True
    for weight, start in _rows(tensor):
        merged = merge(weight, start) if merge else weight
        piece = target.buffer()[: merged.numel() * dtype.itemsize]
        # Rounded once; both conversions are much faster than adding numbers of two types.
        written = torch.frombuffer(piece, dtype=dtype).copy_(merged.view(-1))
        # One pass without a temporary: infinities and NaN survive a sum. Looked at before the thread has the piece.
        finite = bool(torch.isfinite(written.sum(dtype=torch.float32))) and finite
        target.write(piece)
    return finite


def _rows(tensor: MergedTensor) -> Iterator[tuple[torch.Tensor, int]]:
    """What lies at a tensor's source: float32 (rows, columns), to be used at once, and the first row's number."""
    import torch

    dtype = getattr(torch, FLOAT_TYPES[tensor.source.dtype])
    count, columns = tensor.source.shape[0], math.prod(tensor.source.shape[1:])
    together = PIECE // (columns * max(dtype.itemsize, tensor.size // (count * columns)))
    buffer = memoryview(bytearray(PIECE))
    with tensor.source.file.open("rb", buffering=0) as source:
        source.seek(tensor.source.offset)
        for start in range(0, count, together):
            piece = buffer[: min(together, count - start) * columns * dtype.itemsize]
            _fill(source, piece)
            yield torch.frombuffer(piece, dtype=dtype).view(-1, columns).float(), start


def _fill(source: FileIO, piece: memoryview) -> None:
    filled = 0
    while filled < len(piece):
        count = source.readinto(piece[filled:])
        if not count:
            raise BaseModelError(
                "the file ended while it was read",
                where=source.name,
                remedy="Download the base model again",
            )
        filled += count
