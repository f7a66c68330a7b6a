from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from finetune.base_model.embedded import make_embedded_model
from finetune.base_model.models import BaseModelRef
from finetune.base_model.pretraining import Recipe

# As small as the vocabulary of bytes allows: what it says does not matter here.
HURRIED = replace(Recipe(), services=1, rounds=1, vocabulary=300, layers=1, batch=64)


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
