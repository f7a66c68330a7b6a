"""`lora-assets registry`: what the registry keeps, and the served tag that follows it."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune.adapter_files import WEIGHTS_NAME, adapter_hash
from finetune.layout import DataLayout
from finetune.registry.history import read_events
from finetune.registry.promotion import CHAMPION_POINTER, champion
from finetune.registry.store import register_adapter
from lora_assets.cli.app import app
from tests.resources.ollama_server import FakeOllama


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataLayout:
    """A data root with four registered adapters, none of which reigns."""
    import numpy as np
    from safetensors.numpy import save_file

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("NO_COLOR", "1")
    layout = DataLayout(tmp_path / "data")
    for number in range(1, 5):
        adapter = tmp_path / f"adapter-{number}"
        adapter.mkdir()
        save_file({"a": np.full(1000, number, np.float32)}, adapter / WEIGHTS_NAME)
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        register_adapter(
            layout.registry,
            adapter_path=adapter,
            adapter_hash=adapter_hash(adapter),
            trial_id="t",
            run_id=f"run{number}",
            metrics={"eval_loss": 1.0},
            tags={},
            lineage={},
        )
    return layout


@pytest.fixture
def server(layout: DataLayout, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    """An Ollama server that has the models of the first two trainings."""
    with FakeOllama() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OLLAMA_HOST", server.address)
        server.models = {f"predator-v21:run{number}": {"run": number} for number in (1, 2)}
        yield server
        server.shutdown()
        thread.join()


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["registry", *arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.stderr


def test_promotion_and_rollback_move_what_ollama_serves(layout: DataLayout, server: FakeOllama) -> None:
    for version, run in (("v1", "run1"), ("v2", "run2")):
        assert call("promote", version)["served"] == f"predator-v21:{run}"
    assert server.models["predator-v21:champion"] == {"run": 2}
    back = call("rollback", "--reason", "complaints")
    assert (back["version"], back["status"], back["served"]) == ("v1", "champion", "predator-v21:run1")
    assert server.models["predator-v21:champion"] == {"run": 1}
    assert [(event.action, event.version, event.reason) for event in read_events(layout.registry)] == [
        ("promote", "v1", "by hand"),
        ("promote", "v2", "by hand"),
        ("rollback", "v1", "complaints"),
    ]


def test_a_champion_without_exports_reigns_and_the_tag_waits(layout: DataLayout, server: FakeOllama) -> None:
    call("promote", "v1")
    assert call("promote", "v3")["served"] is None
    assert server.models["predator-v21:champion"] == {"run": 1}
    shown = CliRunner().invoke(app, ["registry", "promote", "v3"])
    assert "v3 has no exports yet" in shown.stderr


def test_a_server_that_is_down_leaves_the_registry_moved_and_promoting_again_repairs_the_tag(
    layout: DataLayout, server: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("promote", "v1")
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    error = call("promote", "v2", code=75)
    assert "v2 reigns, but predator-v21:champion on the server is not its model yet" in error
    assert "lora-assets registry promote v2" in error
    reigning = champion(layout.registry)
    assert reigning is not None
    assert reigning.version == "v2"
    assert server.models["predator-v21:champion"] == {"run": 1}
    monkeypatch.setenv("OLLAMA_HOST", server.address)
    assert call("promote", "v2")["served"] == "predator-v21:run2"
    assert server.models["predator-v21:champion"] == {"run": 2}
    assert len(read_events(layout.registry)) == 2


def test_without_a_server_nothing_is_served(layout: DataLayout) -> None:
    assert call("promote", "v1")["served"] is None


def test_gc_says_what_it_would_remove_then_removes_it(layout: DataLayout) -> None:
    call("promote", "v1")
    # Training's own directory holds the second link of v2's weights, but no longer those of v3.
    for file in (layout.root.parent / "adapter-3").iterdir():
        file.unlink()
    planned = call("gc", "--keep", "1", "--dry-run")
    assert [each["version"] for each in planned["versions"]] == ["v2", "v3"]
    weights = layout.registry / "v3" / WEIGHTS_NAME
    assert planned["versions"][0]["freed"] == 0
    assert planned["freed"] == planned["versions"][1]["freed"] > weights.stat().st_size
    assert weights.exists()
    assert call("gc", "--keep", "1") == planned | {"dry_run": False}
    assert not weights.exists()
    statuses = {each["version"]: each["status"] for each in call("list")}
    assert statuses == {"v1": "champion", "v2": "collected", "v3": "collected", "v4": "challenger"}
    assert call("verify")["verified"] == ["v1", "v2", "v3", "v4"]
    shown = CliRunner().invoke(app, ["registry", "gc", "--keep", "1"])
    assert "removed the weights of 0 versions" in shown.output


def test_verify_finds_a_flipped_byte(layout: DataLayout) -> None:
    weights = layout.registry / "v2" / WEIGHTS_NAME
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    assert call("verify", "v1")["verified"] == ["v1"]
    assert "was altered: its SHA-256 differs" in call("verify", code=1)


def test_rebuild_restores_the_pointer_from_the_history(layout: DataLayout) -> None:
    call("promote", "v2")
    pointer = layout.registry / CHAMPION_POINTER
    whole = pointer.read_bytes()
    pointer.write_text('{"version": "v4"}')
    told = {"versions": 4, "champion": "v2", "pointed_at": "v4"}
    assert call("rebuild", "--dry-run") == told | {"dry_run": True}
    assert pointer.read_text() == '{"version": "v4"}'
    assert call("rebuild") == told | {"dry_run": False}
    assert json.loads(pointer.read_bytes()) == json.loads(whole)
    pointer.unlink()
    assert "it pointed at nothing" in CliRunner().invoke(app, ["registry", "rebuild"]).output
    assert pointer.read_bytes() == whole
    assert "was right" in CliRunner().invoke(app, ["registry", "rebuild"]).output


def test_rebuild_removes_a_pointer_that_nothing_stands_for(layout: DataLayout) -> None:
    (layout.registry / CHAMPION_POINTER).write_text('{"version": "v4"}')
    assert call("rebuild")["champion"] is None
    assert not (layout.registry / CHAMPION_POINTER).exists()
