from pathlib import Path

import pytest

from resources.base_model import BaseModelSource


def test_a_directory_and_the_embedded_model_are_here_and_a_repository_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that trains elsewhere fetches no weights of a repository: its commit tells them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    for name, here in ((None, True), (str(tmp_path / "model"), True), ("~/model", True), ("org/model", False)):
        assert BaseModelSource(name=name, cache_dir=str(tmp_path)).is_local is here
