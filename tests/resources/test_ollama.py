from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from finetune.errors import ConfigurationError, ExportError, RemoteError
from finetune.export.modelfile_grammar import Command, format_modelfile
from finetune.export.models import OllamaExport
from finetune.layout import DataLayout
from finetune.progress import ProgressEvent
from finetune.publishing import publish_directory
from finetune.registry.promotion import promote, rollback
from resources.ollama import OllamaServer
from tests.resources.ollama_server import FakeOllama

NAME = "predator-v21:run1"


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def export(tmp_path: Path) -> OllamaExport:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "ollama").mkdir()
    (tmp_path / "gguf" / "base.gguf").write_bytes(b"GGUF base" * 1000)
    (tmp_path / "gguf" / "adapter.gguf").write_bytes(b"GGUF adapter")
    modelfile = tmp_path / "ollama" / "Modelfile"
    commands = [
        Command("from", "../gguf/base.gguf"),
        Command("adapter", "../gguf/adapter.gguf"),
        Command("template", "{{ .Prompt }}\n"),
        Command("stop", "<|im_end|>"),
        Command("stop", "<|endoftext|>"),
        Command("num_ctx", "512"),
        Command("system", "Ти — помічник."),
    ]
    modelfile.write_text(format_modelfile(commands), encoding="utf-8")
    return OllamaExport(path=modelfile.parent, modelfile=modelfile, modelfile_merged=modelfile, created_model=None)


def test_a_model_is_created_as_its_modelfile_says(server: FakeOllama, export: OllamaExport) -> None:
    events: list[ProgressEvent] = []
    name = OllamaServer(host=server.address).create_from(export, name=NAME, on_progress=events.append)
    assert name == NAME
    created = server.models[NAME]
    base, adapter = (export.path.parent / "gguf" / file for file in ("base.gguf", "adapter.gguf"))
    assert server.blobs[created["files"]["base.gguf"]] == base.read_bytes()
    assert server.blobs[created["adapters"]["adapter.gguf"]] == adapter.read_bytes()
    assert created["template"] == "{{ .Prompt }}\n"
    assert created["system"] == "Ти — помічник."
    assert created["parameters"] == {"stop": ["<|im_end|>", "<|endoftext|>"], "num_ctx": 512}
    assert server.requests[-1] == "POST /api/chat"
    assert "ollama: success" in [event.stage for event in events]


def test_without_a_modelfile_of_base_and_adapter_the_merged_one_is_created(
    server: FakeOllama, export: OllamaExport
) -> None:
    OllamaServer(host=server.address).create_from(export.model_copy(update={"modelfile": None}), name=NAME)
    assert "base.gguf" in server.models[NAME]["files"]


def test_creating_twice_uploads_once(server: FakeOllama, export: OllamaExport) -> None:
    ollama = OllamaServer(host=server.address.removeprefix("http://"))
    ollama.create_from(export, name=NAME)
    first = server.models[NAME]
    server.requests.clear()
    ollama.create_from(export, name=NAME)
    assert server.models == {NAME: first}
    assert [request for request in server.requests if request.startswith("POST /api/blobs")] == []


def test_an_error_late_in_the_stream_is_an_error(server: FakeOllama, export: OllamaExport) -> None:
    server.fault = "late"
    with pytest.raises(ExportError, match="unsupported architecture"):
        OllamaServer(host=server.address).create_from(export, name=NAME)


def test_a_file_that_is_no_gguf_is_an_error(server: FakeOllama, export: OllamaExport) -> None:
    (export.path.parent / "gguf" / "adapter.gguf").write_bytes(b"safetensors")
    with pytest.raises(ExportError, match="invalid file magic"):
        OllamaServer(host=server.address).create_from(export, name=NAME)


def test_a_blob_damaged_on_its_way_is_an_error(server: FakeOllama, export: OllamaExport) -> None:
    server.fault = "corrupt"
    with pytest.raises(ExportError, match="digest mismatch"):
        OllamaServer(host=server.address).create_from(export, name=NAME)
    assert server.models == {}


def test_a_model_that_does_not_finish_its_answer_is_an_error(server: FakeOllama, export: OllamaExport) -> None:
    server.fault = "silent"
    with pytest.raises(ExportError, match="did not finish an answer"):
        OllamaServer(host=server.address).create_from(export, name=NAME)


def test_a_refused_name_is_an_error(server: FakeOllama, export: OllamaExport) -> None:
    with pytest.raises(ExportError, match="invalid model name"):
        OllamaServer(host=server.address).create_from(export, name="Bad Name")


def test_a_busy_server_is_a_passing_error(server: FakeOllama, export: OllamaExport) -> None:
    server.fault = "busy"
    with pytest.raises(RemoteError, match="busy"):
        OllamaServer(host=server.address).create_from(export, name=NAME)


def test_an_absent_server_is_a_passing_error(server: FakeOllama, export: OllamaExport) -> None:
    with pytest.raises(RemoteError, match=r"cannot be reached.*OLLAMA_HOST"):
        OllamaServer(host="http://127.0.0.1:9").create_from(export, name=NAME)


@pytest.mark.parametrize("host", ["http://[::1", "ollama:99999"])
def test_what_is_no_address_is_named_with_its_setting(export: OllamaExport, host: str) -> None:
    with pytest.raises(ConfigurationError, match=r"not a server's address.*OLLAMA_HOST"):
        OllamaServer(host=host).create_from(export, name=NAME)


def test_a_server_that_is_no_ollama_is_an_error(export: OllamaExport) -> None:
    class Portal(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Log in</html>")

    with HTTPServer(("127.0.0.1", 0), Portal) as portal:
        thread = threading.Thread(target=portal.serve_forever)
        thread.start()
        try:
            with pytest.raises(ExportError, match="does not answer as Ollama does"):
                OllamaServer(host=f"127.0.0.1:{portal.server_port}").create_from(export, name=NAME)
        finally:
            portal.shutdown()
            thread.join()


def test_without_a_host_nothing_can_be_created(export: OllamaExport) -> None:
    with pytest.raises(ExportError, match="OLLAMA_HOST"):
        OllamaServer().create_from(export, name=NAME)


@pytest.fixture
def layout(tmp_path: Path) -> DataLayout:
    """Two registered adapters, of the trainings run1 and run2."""
    import numpy as np
    from safetensors.numpy import save_file

    from finetune.adapter_files import adapter_hash
    from finetune.registry.store import register_adapter

    layout = DataLayout(tmp_path / "root")
    for number in (1, 2):
        adapter = tmp_path / f"adapter-{number}"
        adapter.mkdir()
        save_file({"a": np.full(4, number, np.float32)}, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        register_adapter(
            layout.registry,
            adapter_path=adapter,
            adapter_hash=adapter_hash(adapter),
            trial_id="t",
            run_id=f"run{number}",
            metrics={},
            tags={},
            lineage={},
        )
    return layout


def test_the_champion_tag_follows_promotion_and_rollback(
    server: FakeOllama, export: OllamaExport, layout: DataLayout
) -> None:
    ollama = OllamaServer(host=server.address)
    assert ollama.serve_champion(layout, "predator-v21") is None, "nobody reigns"
    for number in (1, 2):
        created = ollama.create_from(export, name=f"predator-v21:run{number}")
        server.models[created] = server.models[created] | {"run": number}
        promote(layout.registry, f"v{number}", reason="better", by="test")
        assert ollama.serve_champion(layout, "predator-v21") == created
        assert server.models["predator-v21:champion"]["run"] == number
    rollback(layout.registry, reason="complaints", by="test")
    for _ in range(2):
        assert ollama.serve_champion(layout, "predator-v21") == "predator-v21:run1"
        assert server.models["predator-v21:champion"]["run"] == 1


@pytest.mark.parametrize("name", ["Modelfile", "Modelfile.merged"])
def test_a_champion_that_the_server_lacks_is_created_from_its_exports(
    server: FakeOllama, export: OllamaExport, layout: DataLayout, name: str
) -> None:
    ollama = OllamaServer(host=server.address)
    promote(layout.registry, "v1", reason="better", by="test")
    assert ollama.serve_champion(layout, "predator-v21") is None, "nothing is exported yet"
    assert server.models == {}
    with publish_directory(layout.model("run1", "ollama"), kind="ollama") as staging:
        text = (
            (export.path / "Modelfile").read_text(encoding="utf-8").replace("../gguf", str(export.path.parent / "gguf"))
        )
        (staging.path / name).write_text(text, encoding="utf-8")
    assert ollama.serve_champion(layout, "predator-v21") == "predator-v21:run1"
    assert server.models["predator-v21:champion"] == server.models["predator-v21:run1"]


def test_who_is_promoted_while_the_tag_moves_gets_it(
    server: FakeOllama, export: OllamaExport, layout: DataLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    ollama = OllamaServer(host=server.address)
    for number in (1, 2):
        ollama.create_from(export, name=f"predator-v21:run{number}")
    promote(layout.registry, "v1", reason="better", by="test")
    copy: Callable[..., bool] = OllamaServer._copy
    copied: list[str] = []

    def overtaken(self: OllamaServer, source: str, destination: str) -> bool:
        done = copy(self, source, destination)
        copied.append(source)
        promote(layout.registry, "v2", reason="better", by="another")
        return done

    monkeypatch.setattr(OllamaServer, "_copy", overtaken)
    assert ollama.serve_champion(layout, "predator-v21") == "predator-v21:run2"
    assert copied == ["predator-v21:run1", "predator-v21:run2"]
