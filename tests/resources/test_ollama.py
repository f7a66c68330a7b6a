from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ExportError, RemoteError
from finetune.export.modelfile_grammar import Command, format_modelfile
from finetune.export.models import OllamaExport
from finetune.progress import ProgressEvent
from resources.ollama import OllamaServer

NAME = "predator-v21:run1"
# https://github.com/ollama/ollama/blob/main/docs/api.md
CREATE_FIELDS = {"model", "stream", "files", "adapters", "template", "system", "parameters", "license"}


class FakeOllama(ThreadingHTTPServer):
    """Speaks the documented protocol, strictly: blobs by digest, `files` and `adapters` by name, streamed status."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        # what to go wrong with: "late", "busy", "silent", "corrupt"
        self.fault = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeOllama

    def log_message(self, *args: Any) -> None:
        """Tests read `requests` instead."""

    def _answer(self, status: int, body: object = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, *lines: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        for line in lines:
            self.wfile.write(json.dumps(line).encode() + b"\n")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_HEAD(self) -> None:
        self.server.requests.append(f"HEAD {self.path}")
        known = self.path.removeprefix("/api/blobs/") in self.server.blobs
        self._answer(200 if known else 404)

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        body = self._body()
        if self.path.startswith("/api/blobs/"):
            self._take_blob(self.path.removeprefix("/api/blobs/"), body)
        elif self.server.fault == "busy":
            self._answer(503, {"error": "server busy, please try again"})
        elif self.path == "/api/create":
            self._create(json.loads(body))
        elif self.path == "/api/chat":
            self._chat(json.loads(body))
        else:
            self._answer(404, {"error": "not found"})

    def _take_blob(self, digest: str, body: bytes) -> None:
        if self.server.fault == "corrupt":
            body = body[:-1]
        if digest in self.server.blobs:
            self._answer(200)
        elif digest != f"sha256:{hashlib.sha256(body).hexdigest()}":
            self._answer(400, {"error": "digest mismatch"})
        else:
            self.server.blobs[digest] = body
            self._answer(201)

    def _create(self, request: dict[str, Any]) -> None:
        if unknown := request.keys() - CREATE_FIELDS:
            return self._answer(400, {"error": f"unknown fields {unknown}"})
        if not re.fullmatch(r"[a-z0-9._-]+:[a-zA-Z0-9._-]+", request["model"]):
            return self._answer(400, {"error": "invalid model name"})
        files = request.get("files", {}) | request.get("adapters", {})
        if not request.get("files") or any(digest not in self.server.blobs for digest in files.values()):
            return self._answer(400, {"error": "neither 'from' nor 'files' was specified, or a blob is missing"})
        if not all(self.server.blobs[digest].startswith(b"GGUF") for digest in files.values()):
            return self._stream({"status": "parsing GGUF"}, {"error": "invalid file magic"})
        if self.server.fault == "late":
            return self._stream({"status": "parsing GGUF"}, {"error": "unsupported architecture"})
        self.server.models[request["model"]] = request
        self._stream({"status": "parsing GGUF"}, {"status": "writing manifest"}, {"status": "success"})
        return None

    def _chat(self, request: dict[str, Any]) -> None:
        if request["model"] not in self.server.models:
            return self._answer(404, {"error": f"model {request['model']!r} not found"})
        message = {"role": "assistant", "content": "Hi"}
        done = self.server.fault != "silent"
        return self._answer(200, {"model": request["model"], "message": message, "done": done})


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


def test_without_a_host_nothing_can_be_created(export: OllamaExport) -> None:
    with pytest.raises(ExportError, match="OLLAMA_HOST"):
        OllamaServer().create_from(export, name=NAME)
