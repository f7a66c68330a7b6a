"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadFileScheduling

from finetune.base_model.models import BaseModelRef

# Threads that wait by spinning starve each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests decide for themselves what is in the environment.
for name in ("BASE_MODEL_NAME", "DATABASE_URL", "DATA_ROOT", "TRAINING_BACKEND", "DAGSTER_HOME", "OLLAMA_HOST"):
    os.environ.pop(name, None)

# What a shell runs in the background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What these make for a whole session takes longer than their tests: on one worker it is made once.
TOGETHER = (
    ("tests/e2e/test_demo.py", "tests/e2e/test_gates.py", "tests/e2e/test_regressions.py"),
    ("tests/finetune/export/",),
    ("tests/finetune/reproduction/",),
    ("tests/finetune/training/",),
)


class Scheduling(LoadFileScheduling):
    """Hands out files, or several that belong together, in the order in which they are found.

    The longest, those of the whole loop, come early, and many short ones fill up the end; xdist's own order begins
    with the files of the most tests, which are the short ones.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return next((group[0] for group in TOGETHER if nodeid.startswith(group)), super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling | None:
    """Be the scheduler of --dist loadfile."""
    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


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
