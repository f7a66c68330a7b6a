"""Pushing a version to a hub that speaks the hub's protocol on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.adapter_files import adapter_hash
from finetune.errors import ArtifactError, ConfigurationError, ExportError, RemoteError
from finetune.export.hub import hub_files, push_to_hub
from finetune.export.models import GgufExport, HubPush, MergedModel
from finetune.layout import DataLayout
from finetune.registry.models import RegisteredVersion
from finetune.registry.promotion import promote
from finetune.registry.store import register_adapter
from tests.finetune.export.hub_server import TOKEN, FakeHub

PROGRAM = str(Path(sys.executable).with_name("lora-assets"))
REPO = "acme/brain"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        # Xet's servers are not the hub's own.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub
        hub.shutdown()
        thread.join()


@pytest.fixture
def layout(tmp_path: Path, merged: MergedModel, gguf: GgufExport) -> DataLayout:
    """A data root that holds what was merged and converted of the training run1."""
    layout = DataLayout(tmp_path / "root")
    for part, source in (("merged", merged.path), ("gguf", gguf.path)):
        shutil.copytree(source, layout.model("run1", part))
    return layout


@pytest.fixture
def version(layout: DataLayout, adapter: Path, tmp_path: Path) -> RegisteredVersion:
    adapter = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    # peft's own card names the base model's directory.
    (adapter / "README.md").write_text("---\nbase_model: tests/small\nlicense: apache-2.0\n---\n# An adapter\n")
    return register_adapter(
        layout.registry,
        adapter_path=adapter,
        adapter_hash=adapter_hash(adapter),
        trial_id="t",
        run_id="run1",
        metrics={},
        tags={},
        lineage={},
    )


def push(files: dict[str, Path], **changes: Any) -> HubPush:
    settings: dict[str, Any] = {"repo": REPO, "token": TOKEN, "private": True, "message": "v1"}
    return push_to_hub(files, **(settings | changes))


def test_a_version_lies_on_the_hub_where_programs_look_for_it(
    hub: FakeHub, layout: DataLayout, version: RegisteredVersion
) -> None:
    files = hub_files(layout, version, "brain")
    pushed = push(files)
    assert {
        "README.md",
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "brain-Q4_K_M.gguf",
        "adapter/adapter.gguf",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    } <= files.keys()
    assert not [name for name in files if "manifest" in name or "F16" in name]
    assert (pushed.repo, pushed.private, pushed.unchanged) == (REPO, True, False)
    assert hub.repos[REPO].private
    for name, file in files.items():
        assert hub.content(REPO, name) == file.read_bytes()
    assert "vllm serve" in hub.content(REPO, "README.md").decode()


def test_pushing_again_sends_nothing_and_commits_nothing(
    hub: FakeHub, layout: DataLayout, version: RegisteredVersion
) -> None:
    files = hub_files(layout, version, "brain")
    first = push(files)
    hub.requests.clear()
    again = push(files)
    assert again == first.model_copy(update={"unchanged": True})
    assert not [request for request in hub.requests if request.startswith("PUT") or "/commit/" in request]


def test_parts_are_pushed_alone(hub: FakeHub, layout: DataLayout, version: RegisteredVersion) -> None:
    files = hub_files(layout, version, "brain", ["gguf"])
    assert set(files) == {"brain-Q4_K_M.gguf", "adapter/adapter.gguf", "README.md"}
    assert push(files).files == list(files)
    shutil.rmtree(layout.model("run1", "merged"))
    assert "config.json" not in hub_files(layout, version, "brain")
    with pytest.raises(ConfigurationError, match="no part is named weights"):
        hub_files(layout, version, "brain", ["weights"])
    with pytest.raises(ArtifactError, match="v1 has no merged to push"):
        hub_files(layout, version, "brain", ["merged"])


@pytest.mark.parametrize("part", ["merged", "gguf"])
def test_an_altered_file_is_not_pushed(layout: DataLayout, version: RegisteredVersion, part: str) -> None:
    file = next(layout.model("run1", part).glob("*.safetensors" if part == "merged" else "*Q4_K_M.gguf"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        hub_files(layout, version, "brain")


def test_what_the_hub_alters_is_noticed(hub: FakeHub, layout: DataLayout, version: RegisteredVersion) -> None:
    hub.fault = "corrupt"
    with pytest.raises(ExportError, match=r"the hub does not hold adapter/README\.md as it was sent"):
        push(hub_files(layout, version, "brain", ["adapter"]))


def test_a_public_repository_is_refused_where_a_private_one_is_asked_for(
    hub: FakeHub, layout: DataLayout, version: RegisteredVersion
) -> None:
    files = hub_files(layout, version, "brain", ["gguf"])
    assert not push(files, private=False).private
    with pytest.raises(ConfigurationError, match="HUB_PRIVATE"):
        push(files)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("denied", ExportError, "don't have the rights .* HF_TOKEN"),
        ("busy", RemoteError, "the hub is busy"),
    ],
)
def test_a_refusal_lasts_and_a_busy_hub_passes(
    hub: FakeHub, layout: DataLayout, version: RegisteredVersion, fault: str, error: type[Exception], message: str
) -> None:
    hub.fault = fault
    with pytest.raises(error, match=message):
        push(hub_files(layout, version, "brain", ["gguf"]))
    assert any("/commit/" in request for request in hub.requests) == (fault == "busy")


def test_without_a_token_or_a_hub_nothing_is_pushed(
    layout: DataLayout, version: RegisteredVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub_files(layout, version, "brain", ["gguf"])
    with pytest.raises(ConfigurationError, match="HF_TOKEN"):
        push(files, token=None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="cannot be reached"):
        push(files)


def test_the_command_pushes_the_champion_and_never_tells_the_token(
    hub: FakeHub, layout: DataLayout, version: RegisteredVersion
) -> None:
    promote(layout.registry, version.version, reason="first", by="test")
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")} | {
        "DATA_ROOT": str(layout.root),
        "HUB_REPO": REPO,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "COLUMNS": "200",
    }

    def call(*arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, "push", *arguments],
            env=environment | {"HF_TOKEN": token},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    done = call("--part", "gguf", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == ["brain-Q4_K_M.gguf", "adapter/adapter.gguf", "README.md"]
    wrong = call("v1", "--repo", REPO, token=TOKEN + "x")
    assert wrong.returncode == 1
    assert "the hub refuses: Invalid username or password. [" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert TOKEN not in done.stdout + done.stderr + wrong.stdout + wrong.stderr
