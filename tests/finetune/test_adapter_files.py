from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from finetune.adapter_files import WEIGHTS_NAME, adapter_hash, non_finite_tensors
from finetune.errors import ArtifactError


def write_adapter(directory: Path, tensors: dict[str, Any], **config: Any) -> Path:
    from safetensors.torch import save_file

    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata=config.pop("metadata", None))
    (directory / "adapter_config.json").write_text(json.dumps({"r": 8, "target_modules": ["q", "v"], **config}))
    return directory


def tensors(change: float = 0.0) -> dict[str, Any]:
    import torch

    return {"a": torch.arange(4, dtype=torch.bfloat16), "b": torch.full((2, 3), 1.0 + change)}


def test_place_base_path_order_and_metadata_do_not_matter(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", tensors(), base_model_name_or_path="/here")
    reordered = dict(reversed(tensors().items()))
    two = write_adapter(
        tmp_path / "two",
        reordered,
        base_model_name_or_path="there",
        target_modules=["v", "q"],
        metadata={"format": "pt"},
    )
    assert adapter_hash(one) == adapter_hash(two)


def test_weights_and_configuration_matter(tmp_path: Path) -> None:
    import torch

    hashes = {
        adapter_hash(write_adapter(tmp_path / "one", tensors())),
        adapter_hash(write_adapter(tmp_path / "two", tensors(1e-6))),
        adapter_hash(write_adapter(tmp_path / "three", tensors(), r=4)),
        adapter_hash(write_adapter(tmp_path / "four", {**tensors(), "a": torch.arange(4, dtype=torch.float16)})),
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("size", [0, 4, 8, 40, -10])
def test_weights_that_end_too_early_are_named(size: int, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "one", tensors())
    weights = adapter / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"damaged.*adapter_model\.safetensors"):
        adapter_hash(adapter)


def test_tensors_with_a_value_that_is_no_number_are_named_for_every_type(tmp_path: Path) -> None:
    import torch

    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    good = {
        f"good {kind}": torch.tensor([0.0, torch.finfo(kind).max, torch.finfo(kind).tiny], dtype=kind) for kind in types
    }
    assert non_finite_tensors(write_adapter(tmp_path / "good", good | {"int": torch.arange(3)})) == []
    # The last of more values than are read at once.
    large = torch.zeros(3_000_001, dtype=torch.bfloat16)
    large[-1] = float("nan")
    bad = {"large": large} | {
        f"{name} {kind}": torch.tensor([1.0, float(name)], dtype=kind)
        for kind in types
        for name in ("nan", "inf", "-inf")
    }
    assert non_finite_tensors(write_adapter(tmp_path / "bad", good | bad)) == sorted(bad)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b'{"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}', "unknown type F8_E4M3"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}}', "cannot be read: buffer size"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "damaged: the tensor a ends before"),
        (b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', "damaged: it ends within"),
        (b"[" * 100_000, "damaged"),
    ],
)
def test_weights_that_cannot_be_looked_at_are_an_error(tmp_path: Path, header: bytes, told: str) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ArtifactError, match=told):
        non_finite_tensors(tmp_path)
