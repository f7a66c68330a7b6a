"""Adapters of a few bytes, in PEFT's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.adapter_files import adapter_hash
from finetune.registry.models import RegisteredVersion
from finetune.registry.store import register_adapter


def _make_adapter(path: Path, seed: int = 0, base: str = "/somewhere/base") -> Path:
    from safetensors.numpy import save_file

    path.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    save_file(
        {f"base_model.model.layer.{side}.weight": generator.normal(size=(4, 4)) for side in ("lora_A", "lora_B")},
        path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": base}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "README.md").write_text("# An adapter\n", encoding="utf-8")
    return path


def _register(registry: Path, adapter: Path, **changes: Any) -> RegisteredVersion:
    settings: dict[str, Any] = {
        "adapter_hash": adapter_hash(adapter),
        "trial_id": "trial-1",
        "run_id": "run-1",
        "metrics": {"eval_loss": 1.5},
        "tags": {"date": "2026-01-02"},
        "lineage": {"base_model_fingerprint": "base-0", "dataset_fingerprint": "data-0"},
    } | changes
    return register_adapter(registry, adapter_path=adapter, **settings)


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    return _make_adapter


@pytest.fixture(scope="session")
def register() -> Callable[..., RegisteredVersion]:
    return _register


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry" / "brain"
