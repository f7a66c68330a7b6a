"""Versions: immutable, content-addressed, numbered without gaps or doubles."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.adapter_files import WEIGHTS_NAME, adapter_hash
from finetune.errors import ArtifactError, StorageFullError
from finetune.publishing import MANIFEST_NAME, publish_directory, read_manifest
from finetune.registry.models import Decision, RegisteredVersion
from finetune.registry.promotion import promote, settle
from finetune.registry.store import (
    EXPERIMENT_MANIFEST,
    KIND,
    collect_garbage,
    get_version,
    list_versions,
    verify_version,
)

MakeAdapter = Callable[..., Path]
Register = Callable[..., RegisteredVersion]


def test_a_registered_version_holds_the_adapter_and_says_where_it_came_from(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    version = register(registry, adapter)
    assert version.version == "v1"
    assert version.stored_path == registry / "v1"
    assert version.status == "challenger"
    assert (version.stored_path / WEIGHTS_NAME).read_bytes() == (adapter / WEIGHTS_NAME).read_bytes()
    read_manifest(version.stored_path, kind=KIND, verify="hashes")
    stated = json.loads((version.stored_path / EXPERIMENT_MANIFEST).read_text(encoding="utf-8"))
    assert stated["version"] == "v1"
    assert stated["inputs"]["dataset_fingerprint"] == "data-0"
    assert stated["metrics"] == {"eval_loss": 1.5}
    assert stated["libraries"]["numpy"]
    assert stated["hardware"]["cpus"] == os.cpu_count()
    assert stated["outputs"][WEIGHTS_NAME]["sha256"]
    assert get_version(registry, "v1") == version
    assert list_versions(registry) == [version]


def test_the_environment_does_not_reach_the_manifest(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("H2O_API_KEY", "sesame-open")
    monkeypatch.setattr(sys, "argv", ["prog", "--h2o-api-key", "sesame-open", "--hf-token=sesame-open", "--date", "d"])
    version = register(registry, make_adapter(tmp_path / "adapter"))
    text = (version.stored_path / EXPERIMENT_MANIFEST).read_text(encoding="utf-8")
    assert "sesame-open" not in text
    assert json.loads(text)["command"] == ["prog", "--h2o-api-key", "***", "--hf-token=***", "--date", "d"]


def test_the_same_adapter_twice_is_one_version_wherever_its_base_model_lay(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    first = register(registry, make_adapter(tmp_path / "one"))
    again = register(registry, make_adapter(tmp_path / "two", base="/elsewhere"), run_id="run-2")
    other = register(registry, make_adapter(tmp_path / "three", seed=3))
    assert again == first
    assert other.version == "v2"


def test_an_adapter_published_by_training_is_checked_before_it_is_kept(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    source = make_adapter(tmp_path / "source")
    adapter = tmp_path / "adapter"
    with publish_directory(adapter, kind="adapter") as staging:
        shutil.copytree(source, staging.path, dirs_exist_ok=True)
    known_hash = adapter_hash(adapter)
    (adapter / "README.md").write_bytes(b"# Another\n!!")
    with pytest.raises(ArtifactError, match="instead of"):
        register(registry, adapter)
    (adapter / "README.md").write_bytes(b"# An adapter\n")
    version = register(registry, adapter)
    assert read_manifest(version.stored_path).kind == KIND
    assert version.adapter_hash == known_hash


def test_an_adapter_that_is_not_the_one_of_its_hash_is_refused(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    with pytest.raises(ArtifactError, match=r"not f{64} as training reported"):
        register(registry, make_adapter(tmp_path / "adapter"), adapter_hash="f" * 64)
    assert list_versions(registry) == []


@pytest.mark.parametrize("missing", [WEIGHTS_NAME, "adapter_config.json"])
def test_half_an_adapter_is_refused(
    missing: str, registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    known_hash = adapter_hash(adapter)
    (adapter / missing).unlink()
    with pytest.raises(ArtifactError, match=missing):
        register(registry, adapter, adapter_hash=known_hash)


def test_a_flipped_byte_is_found_in_every_file(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    version = register(registry, make_adapter(tmp_path / "adapter"))
    assert verify_version(registry, "v1") == version
    files = [path for path in version.stored_path.iterdir() if path.name != MANIFEST_NAME]
    assert len(files) == 4
    for path in files:
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            with pytest.raises(ArtifactError):
                verify_version(registry, "v1")
        path.write_bytes(whole)
    verify_version(registry, "v1")
    (version.stored_path / "adapter_model.bin").write_bytes(b"planted")
    with pytest.raises(ArtifactError, match="added"):
        verify_version(registry, "v1")


@pytest.mark.parametrize("name", ["v2", "latest", "../v1", "v01", "v0", ""])
def test_a_version_that_is_not_there_is_answered_with_those_that_are(
    name: str, registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    register(registry, make_adapter(tmp_path / "adapter"))
    with pytest.raises(ArtifactError, match=r"Choose one of those it has: v1"):
        get_version(registry, name)


WRITER = """
import sys
from pathlib import Path
from finetune.adapter_files import adapter_hash
from finetune.registry.store import register_adapter

registry, adapters, barrier = Path(sys.argv[1]), sys.argv[3:], Path(sys.argv[2])
print("ready", flush=True)
while not barrier.exists():
    pass
for path in map(Path, adapters):
    version = register_adapter(
        registry, adapter_path=path, adapter_hash=adapter_hash(path), trial_id="t", run_id=path.name,
        metrics={}, tags={}, lineage={},
    )
    print(path.name, version.version, flush=True)
"""


def test_eight_writers_at_once_leave_neither_gaps_nor_doubles(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    shared = [make_adapter(tmp_path / f"shared-{number}", seed=number) for number in range(3)]
    barrier = tmp_path / "go"
    writers = []
    for writer in range(8):
        own = [
            make_adapter(tmp_path / f"own-{writer}-{number}", seed=100 + 10 * writer + number) for number in range(2)
        ]
        adapters = [own[0], *shared, own[1]]
        command = [sys.executable, "-c", WRITER, str(registry), str(barrier), *map(str, adapters)]
        writers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    barrier.touch()
    told: dict[str, set[str]] = {}
    for process in writers:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        for line in output.splitlines():
            name, version = line.split()
            told.setdefault(name, set()).add(version)
    versions = list_versions(registry)
    assert [version.version for version in versions] == [f"v{number}" for number in range(1, 20)]
    assert len({version.adapter_hash for version in versions}) == 19
    assert all(len(answers) == 1 for answers in told.values())
    for version in versions:
        verify_version(registry, version.version)
    assert [path for path in registry.iterdir() if path.name.startswith(".")] == []


STALLED = """
import sys, time
from pathlib import Path
from finetune import publishing
from finetune.registry import store
from finetune.adapter_files import adapter_hash

registry, adapter, marker, module, name = map(str, sys.argv[1:])

def stall(*arguments):
    Path(marker).touch()
    time.sleep(600)

setattr({"store": store, "publishing": publishing}[module], name, stall)
path = Path(adapter)
store.register_adapter(
    Path(registry), adapter_path=path, adapter_hash=adapter_hash(path), trial_id="t", run_id="r",
    metrics={}, tags={}, lineage={},
)
"""


@pytest.mark.parametrize(
    ("module", "function"), [("store", "_link_or_copy"), ("publishing", "_finish"), ("publishing", "_rename_to_new")]
)
def test_a_writer_killed_half_way_leaves_nothing_that_counts(
    module: str, function: str, registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    register(registry, make_adapter(tmp_path / "first"))
    adapter = make_adapter(tmp_path / "second", seed=2)
    marker = tmp_path / "marker"
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, str(registry), str(adapter), str(marker), module, function]
    )
    while not marker.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [path for path in registry.iterdir() if ".tmp-" in path.name], "the kill came while it was writing"
    assert [version.version for version in list_versions(registry)] == ["v1"]
    assert register(registry, adapter).version == "v2"
    verify_version(registry, "v2")


def test_a_copy_serves_where_hard_links_do_not(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        refusals.append(1)
        raise OSError(18, "Invalid cross-device link")

    refusals: list[int] = []
    monkeypatch.setattr(os, "link", refused)
    register(registry, make_adapter(tmp_path / "adapter"))
    assert refusals
    verify_version(registry, "v1")


def test_a_full_disk_leaves_nothing_behind(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(StorageFullError):
            register(registry, adapter)
    assert list(registry.iterdir()) == []
    assert register(registry, adapter).version == "v1"


def test_a_version_under_another_name_is_noticed(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    register(registry, make_adapter(tmp_path / "adapter"))
    (registry / "v1").rename(registry / "v2")
    with pytest.raises(ArtifactError, match="the directory v2 holds version v1"):
        verify_version(registry, "v2")


def test_lineage_is_read_back_as_it_was_given(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    lineage = {"base_model_fingerprint": "b", "plan": {"seed": 42, "path": tmp_path}, "files": [{"sha256": "0"}]}
    version = register(registry, make_adapter(tmp_path / "adapter"), lineage=lineage)
    assert version.lineage == lineage | {"plan": {"seed": 42, "path": str(tmp_path)}}
    assert version.base_fingerprint == "b"


def test_collecting_garbage_removes_old_challengers_and_never_a_number(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register
) -> None:
    adapters = [make_adapter(tmp_path / f"adapter-{number}", seed=number) for number in range(5)]
    for adapter in adapters:
        register(registry, adapter)
    for version in ("v1", "v2"):
        promote(registry, version, reason="better", by="test")
    settle(registry, "v3", Decision(champion=False, reason="worse", against="v2"), by="test")
    assert collect_garbage(registry, keep=1, by="test") == ["v3", "v4"]
    statuses = [version.status for version in list_versions(registry)]
    assert statuses == ["retired", "champion", "collected", "collected", "challenger"]
    assert not (registry / "v3" / WEIGHTS_NAME).exists()
    for number in range(1, 6):
        verify_version(registry, f"v{number}")
    assert collect_garbage(registry, keep=1, by="test") == []
    assert register(registry, adapters[2]).version == "v6"
    with pytest.raises(ArtifactError, match="weights were removed"):
        promote(registry, "v3", reason="again", by="test")


def test_an_interrupted_collection_is_finished_by_the_next(
    registry: Path, tmp_path: Path, make_adapter: MakeAdapter, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        register(registry, make_adapter(tmp_path / f"adapter-{number}", seed=number))

    def killed(path: Path) -> None:
        raise KeyboardInterrupt(str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda path, **_: killed(path) if path.parent.name == "v1" else None)
        with pytest.raises(KeyboardInterrupt):
            collect_garbage(registry, keep=1, by="test")
    assert (registry / "v1" / WEIGHTS_NAME).exists()
    collect_garbage(registry, keep=1, by="test")
    assert not (registry / "v1" / WEIGHTS_NAME).exists()
