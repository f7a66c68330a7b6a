"""An adapter in PEFT's layout as it lies on disk: its configuration, and the hash that makes two the same."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import ArtifactError
from finetune.publishing import canonical_json

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
# They name places and versions of libraries, not what the adapter does.
_IGNORED = frozenset({"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"})
# PyTorch's names of the types that safetensors has; hashes are told in them.
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_CHUNK = 1 << 20
_REMEDY = "Train the adapter again, or restore its directory from a backup"


def read_adapter_config(adapter_path: Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter in PEFT's layout.

    Raises:
        ArtifactError: it is missing or is not a JSON object.
    """
    path = adapter_path / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError("no adapter here: adapter_config.json is missing", where=path, remedy=_REMEDY) from error
    except ValueError as error:
        raise ArtifactError(f"unreadable adapter configuration: {error}", where=path, remedy=_REMEDY) from error
    if not isinstance(config, dict):
        raise ArtifactError("the adapter configuration is not a JSON object", where=path, remedy=_REMEDY)
    return config


def adapter_hash(adapter_path: Path) -> str:
    """SHA-256 in hexadecimal of an adapter's tensors (by name) and configuration (sorted keys).

    Neither the order of tensors in the file nor the base model's place nor the library's version matters.

    Raises:
        ArtifactError: the weights or the configuration are missing or damaged.
    """
    digest = hashlib.sha256(canonical_json(_without_order(read_adapter_config(adapter_path))))
    for name, dtype, shape, chunks in _tensors(adapter_path / WEIGHTS_NAME):
        digest.update(canonical_json([name, f"torch.{_TYPES.get(dtype, dtype)}", shape]))
        for chunk in chunks:
            digest.update(chunk)
    return digest.hexdigest()


def non_finite_tensors(adapter_path: Path) -> list[str]:
    """Names of the adapter's tensors that hold NaN or infinity.

    Raises:
        ArtifactError: the weights are missing or damaged, or of a type that adapters do not have.
    """
    import numpy as np

    def finite(dtype: str, chunk: bytes) -> bool:
        if dtype == "BF16":
            # NumPy has no such type; all bits of the exponent say: not a finite number.
            return bool(((np.frombuffer(chunk, "<u2") & 0x7F80) != 0x7F80).all())
        if dtype in ("F16", "F32", "F64"):
            return bool(np.isfinite(np.frombuffer(chunk, f"<f{int(dtype[1:]) // 8}")).all())
        if dtype in _TYPES:
            return True
        raise ValueError(f"the unknown type {dtype}")

    path = adapter_path / WEIGHTS_NAME
    broken = []
    for name, dtype, _, chunks in _tensors(path):
        try:
            if not all(finite(dtype, chunk) for chunk in chunks):
                broken.append(name)
        except ValueError as error:
            raise ArtifactError(
                f"the adapter's tensor {name} cannot be read: {error}", where=path, remedy=_REMEDY
            ) from error
    return broken


def _tensors(path: Path) -> Iterator[tuple[str, str, list[int], Iterator[bytes]]]:
    """Name, type, shape and data of each tensor, by name; the data in pieces, to be read before the next tensor.

    Reads the safetensors format itself (8 bytes of header length, JSON header, data), so no training library is
    needed.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        with path.open("rb") as stream:
            (header_length,) = struct.unpack("<Q", stream.read(8))
            if header_length > path.stat().st_size - 8:
                raise ValueError("its header reaches beyond its end")
            tensors = json.loads(stream.read(header_length))
            tensors.pop("__metadata__", None)
            for name, tensor in sorted(tensors.items()):
                begin, end = tensor["data_offsets"]
                if not 0 <= begin <= end:
                    raise ValueError(f"the tensor {name} ends before it begins")
                chunks = _pieces(stream, path, name, 8 + header_length + begin, end - begin)
                yield name, tensor["dtype"], tensor["shape"], chunks
    except FileNotFoundError as error:
        raise ArtifactError(f"no adapter here: {WEIGHTS_NAME} is missing", where=path, remedy=_REMEDY) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ArtifactError(f"the adapter's weights are damaged: {error}", where=path, remedy=_REMEDY) from error


def _pieces(stream: BinaryIO, path: Path, name: str, begin: int, remaining: int) -> Iterator[bytes]:
    stream.seek(begin)
    while remaining:
        piece = stream.read(min(_CHUNK, remaining))
        if not piece:
            raise ArtifactError(
                f"the adapter's weights are damaged: it ends within the tensor {name}", where=path, remedy=_REMEDY
            )
        yield piece
        remaining -= len(piece)


def _without_order(config: dict[str, Any]) -> dict[str, Any]:
    # PEFT writes sets of module names, whose order changes from run to run.
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
        for key, value in config.items()
        if key not in _IGNORED
    }
