"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from filelock import FileLock

from finetune.base_model.models import BaseModelRef

# Threads that wait by spinning starve each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests decide for themselves what is in the environment.
for name in ("BASE_MODEL_NAME", "DATABASE_URL", "DATA_ROOT", "TRAINING_BACKEND", "DAGSTER_HOME", "OLLAMA_HOST"):
    os.environ.pop(name, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI only a missing GPU may skip a test."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests by name where there is no GPU."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_model() -> BaseModelRef:
    """The embedded base model, pre-trained once per user and then taken from the cache."""
    from finetune.base_model.embedded import make_embedded_model

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora-assets"
    cache.mkdir(parents=True, exist_ok=True)
    # Of test processes side by side one makes it.
    with FileLock(cache / "tests.lock"):
        return make_embedded_model(cache)
