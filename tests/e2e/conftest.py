"""The demo, run once as a user would, whose artifacts many tests look at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pydantic import BaseModel

from finetune.base_model.models import BaseModelRef
from finetune.layout import DataLayout
from lora_assets.cli.demo import DEMO_SETTINGS

PROGRAM = str(Path(sys.executable).with_name("lora-assets"))
DATES = ["2026-06-01", "2026-06-08", "2026-06-15"]
Model = TypeVar("Model", bound=BaseModel)


@dataclass
class Loop:
    """A data root on which the loop ran, and the environment that it ran with."""

    root: Path
    environment: dict[str, str]
    output: str = ""

    @property
    def layout(self) -> DataLayout:
        return DataLayout(self.root)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=1100,
        )

    def run_json(self, *arguments: str, **environment: str) -> Any:
        done = self.run(*arguments, "--json", **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def value(self, asset: str, date: str, model: type[Model]) -> Model:
        path = self.layout.asset_values / "brain" / asset / f"{date}.json"
        return model.model_validate_json(path.read_bytes())


def new_loop(root: Path, tiny_model: BaseModelRef) -> Loop:
    """An empty data root that knows the embedded base model already."""
    base_models = DataLayout(root).base_models
    base_models.mkdir(parents=True)
    (base_models / tiny_model.path.name).symlink_to(tiny_model.path)
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "CI")}
    environment |= DEMO_SETTINGS | {"DATA_ROOT": str(root), "COLUMNS": "200", "OMP_NUM_THREADS": "2"}
    return Loop(root, environment)


@contextmanager
def data_root() -> Iterator[Path]:
    """A path for a data root, outside of pytest's own directory.

    As root, PostgreSQL runs as another user and must be let through; another session of pytest would take
    that right away again from everything under pytest's directory.
    """
    parent = Path(tempfile.mkdtemp(prefix="lora-assets-"))
    try:
        yield parent / "root"
    finally:
        shutil.rmtree(parent, ignore_errors=True)


@pytest.fixture
def loop(tiny_model: BaseModelRef) -> Iterator[Loop]:
    """An empty data root."""
    with data_root() as root:
        yield new_loop(root, tiny_model)


@pytest.fixture(scope="session")
def demo(tiny_model: BaseModelRef) -> Iterator[Loop]:
    """The data root after `lora-assets demo`. Tests that alter an artifact work on a copy of it."""
    with data_root() as root:
        loop = new_loop(root, tiny_model)
        done = loop.run("demo")
        loop.output = done.stdout + done.stderr
        assert done.returncode == 0, loop.output[-5000:]
        yield loop
