"""What `publish_directory` replaces, what it refuses to, and what it clears away."""

import os
import time
from pathlib import Path

import pytest

from finetune.errors import ArtifactError
from finetune.publishing import TEMPORARY_MARK, publish_directory, read_manifest


def publish(target: Path, *, kind: str = "thing", content: str = "new") -> None:
    with publish_directory(target, kind=kind) as staging:
        (staging.path / "file").write_text(content)


def test_an_artifact_of_the_same_kind_and_an_empty_directory_are_replaced(tmp_path: Path) -> None:
    target = tmp_path / "made"
    target.mkdir()
    publish(target, content="old")
    publish(target)
    assert (target / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_of_the_users_own_files_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="no artifact") as raised:
        publish(target)
    assert str(target) in str(raised.value)
    assert (target / "chapter.txt").read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "thesis.pdf"
    target.write_text("years of work")
    with pytest.raises(ArtifactError, match="no artifact"):
        publish(target)
    assert target.read_text() == "years of work"


@pytest.mark.parametrize("manifest", [None, "{", "[]"])
def test_an_artifact_of_another_kind_is_never_replaced(tmp_path: Path, manifest: str | None) -> None:
    target = tmp_path / "v1"
    publish(target, kind="registered_adapter")
    if manifest is not None:
        (target / "manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError, match="registered_adapter" if manifest is None else "unknown"):
        publish(target, kind="evaluation")
    assert (target / "file").is_file()
    assert manifest or read_manifest(target).kind == "registered_adapter"


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path: Path) -> None:
    target = tmp_path / "made [1]"
    dead, alive, other = (tmp_path / f".{name}{TEMPORARY_MARK}1-ab" for name in (target.name, target.name, "other"))
    alive = alive.with_name(f"{alive.name}c")
    yesterday = time.time() - 25 * 3600
    for directory in (dead, alive, other):
        directory.mkdir()
        (directory / "shard").write_text("half")
        for path in (directory / "shard", directory):
            os.utime(path, (yesterday, yesterday))
    # Its writer is at work: a file grows, which does not change the directory.
    os.utime(alive / "shard")
    publish(target)
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()
