"""What makes two adapters the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ArtifactError
from finetune.registry.hashing import CONFIG_NAME, WEIGHTS_NAME, adapter_hash

MakeAdapter = Callable[..., Path]


def rewrite_config(adapter: Path, **changes: Any) -> None:
    path = adapter / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(dict(reversed(config.items())), indent=1), encoding="utf-8")


def test_order_and_place_do_not_change_the_hash(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    first, second = make_adapter(tmp_path / "one"), make_adapter(tmp_path / "two")
    rewrite_config(second, target_modules=["v_proj", "q_proj"], base_model_name_or_path="/elsewhere")
    content = (second / WEIGHTS_NAME).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    rewritten = json.dumps({"__metadata__": {"format": "pt"}} | dict(reversed(header.items()))).encode()
    (second / WEIGHTS_NAME).write_bytes(len(rewritten).to_bytes(8, "little") + rewritten + content[8 + length :])
    assert adapter_hash(first) == adapter_hash(second)


def test_weights_and_configuration_change_the_hash(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    known = adapter_hash(make_adapter(tmp_path / "one"))
    assert adapter_hash(make_adapter(tmp_path / "two", seed=1)) != known
    third = make_adapter(tmp_path / "three")
    rewrite_config(third, lora_alpha=32)
    assert adapter_hash(third) != known


@pytest.mark.parametrize("size", [0, 4, 8, 40, -10])
def test_weights_that_end_too_early_are_named(size: int, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(tmp_path / "one")
    weights = adapter / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"damaged.*adapter_model\.safetensors"):
        adapter_hash(adapter)
