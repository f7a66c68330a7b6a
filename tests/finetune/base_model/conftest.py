from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.base_model.embedded import make_embedded_model
from finetune.base_model.models import BaseModelRef
from finetune.base_model.pretraining import Recipe

# As small as the vocabulary of bytes allows: what it says does not matter here.
HURRIED = replace(Recipe(), services=1, rounds=1, vocabulary=300, layers=1, batch=64)


@pytest.fixture(scope="session")
def hurried() -> Recipe:
    return HURRIED


@pytest.fixture(scope="session")
def examples() -> SimpleNamespace:
    """The program that writes the example exports, its names as attributes."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "examples" / "make_exports.py")))


@pytest.fixture(scope="session")
def hurried_model(tmp_path_factory: pytest.TempPathFactory) -> BaseModelRef:
    return make_embedded_model(tmp_path_factory.mktemp("hurried"), recipe=HURRIED)


@pytest.fixture
def model_directory(hurried_model: BaseModelRef, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in hurried_model.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy
