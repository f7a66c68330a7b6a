"""Quantization of GGUF files with llama.cpp's own kernels.

``llama-quantize`` does it where it is installed. Otherwise `finetune.export.tensor_types` says which tensor gets which
type, and each is quantized by ``ggml_quantize_chunk`` out of the runtime's shared library. Both give
the same bytes.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError
from finetune.export.tensor_types import QUANTIZATIONS, ModelShape, check_quantization, choose_types

if TYPE_CHECKING:
    import numpy as np

_QUANTIZATION_VERSION = 2
_ALIGNMENT = 32
_UINT32 = 4


def quantize_gguf(source: Path, target: Path, quantization: str, *, threads: int = 2) -> None:
    """Write `source`, a GGUF file of F32, F16 or BF16, to `target` in `quantization`.

    Raises:
        ConfigurationError: an unknown quantization.
        ExportError: quantization failed, or only ``llama-quantize`` can do it (mixtures of experts, Falcon).
    """
    check_quantization(quantization)
    program = shutil.which("llama-quantize")
    if program is None:
        _quantize_in_process(source, target, quantization, threads)
        return
    command = [program, str(source), str(target), quantization, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise ExportError(
            f"llama-quantize failed: {done.stderr.strip().splitlines()[-1:]}",
            where=source,
            remedy="Choose another quantization",
        )


def _quantize_in_process(source: Path, target: Path, quantization: str, threads: int) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(source)
    shape = _model_shape(reader)
    tensors = sorted(reader.tensors, key=lambda tensor: (_layer(tensor.name), tensor.name))
    described = [(t.name, tuple(int(n) for n in t.shape), t.tensor_type.name) for t in tensors]
    types = choose_types(quantization, described, shape)
    with target.open("wb") as stream, ThreadPoolExecutor(threads) as pool:
        _write_header(stream, reader, described, types, QUANTIZATIONS[quantization][0])
        for tensor, (name, dimensions, present) in zip(tensors, described, strict=True):
            kind = types[name]
            if kind == present:
                data = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)
            else:
                rows = _as_float32(tensor.data, present).reshape(-1, dimensions[0])
                data = _quantize_rows(rows, GGMLQuantizationType[kind], pool, threads)
            stream.write(data.data)
            stream.write(bytes(-len(data) % _ALIGNMENT))


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _model_shape(reader: Any) -> ModelShape:
    def number(key: str, default: int) -> int:
        field = reader.fields.get(f"{architecture}.{key}")
        value = default if field is None else field.contents()
        return int(max(value) if isinstance(value, list) else value)

    architecture = str(reader.fields["general.architecture"].contents())
    heads = number("attention.head_count", 1)
    return ModelShape(
        architecture,
        number("block_count", 0),
        heads,
        number("attention.head_count_kv", heads),
    )


def _write_header(
    stream: Any, reader: Any, tensors: list[tuple[str, tuple[int, ...], str]], types: dict[str, str], file_type: int
) -> None:
    """GGUF version 3: magic, counts, key-value pairs, tensor descriptions, padding."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    replaced = ("general.quantization_version", "general.file_type")
    # The reader shows the header's own counts as fields, too.
    kept = [field for name, field in reader.fields.items() if not name.startswith("GGUF.") and name not in replaced]
    stream.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(kept) + len(replaced)))
    for field in kept:
        for part in field.parts:
            stream.write(part.tobytes())
    for key, value in zip(replaced, (_QUANTIZATION_VERSION, file_type), strict=True):
        stream.write(_string(key) + struct.pack("<II", _UINT32, value))
    offset = 0
    for name, dimensions, _ in tensors:
        kind = GGMLQuantizationType[types[name]]
        stream.write(_string(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        stream.write(struct.pack("<IQ", kind.value, offset))
        size = 1
        for length in quant_shape_to_byte_shape(tuple(reversed(dimensions)), kind):
            size *= int(length)
        offset += size + -size % _ALIGNMENT
    stream.write(bytes(-stream.tell() % _ALIGNMENT))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _as_float32(data: Any, kind: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    import numpy as np

    if kind == "BF16":
        return (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.asarray(data, dtype=np.float32)


def _quantize_rows(
    rows: np.ndarray[Any, np.dtype[np.float32]], kind: Any, pool: ThreadPoolExecutor, threads: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    import numpy as np
    from gguf import quant_shape_to_byte_shape

    library = _library()
    if kind.name == "F16":
        return rows.astype(np.float16).reshape(-1).view(np.uint8)
    rows = np.ascontiguousarray(rows)
    height, width = rows.shape
    output = np.empty(quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
    # Initializes tables under a lock of its own, once, before the threads ask for them.
    library.ggml_quantize_init(kind.value)

    def quantize(first: int, count: int) -> None:
        library.ggml_quantize_chunk(kind.value, rows.ctypes.data, output.ctypes.data, first * width, count, width, None)

    step = -(-height // threads)
    for done in [pool.submit(quantize, first, min(step, height - first)) for first in range(0, height, step)]:
        done.result()
    if not library.ggml_validate_row_data(kind.value, output.ctypes.data, output.nbytes):
        raise ExportError("a tensor holds numbers that are not finite and cannot be quantized")
    return output.reshape(-1)


def _library() -> ctypes.CDLL:
    import xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    chunk = library.ggml_quantize_chunk
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    chunk.restype = ctypes.c_size_t
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library
