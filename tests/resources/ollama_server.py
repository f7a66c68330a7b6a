"""An Ollama server in this process that speaks the documented protocol strictly."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# https://github.com/ollama/ollama/blob/main/docs/api.md
MODEL_NAME = r"[a-z0-9._-]+:[a-zA-Z0-9._-]+"
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
        elif self.path == "/api/copy":
            self._copy(json.loads(body))
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
        if not re.fullmatch(MODEL_NAME, request["model"]):
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

    def _copy(self, request: dict[str, Any]) -> None:
        if request.keys() != {"source", "destination"}:
            return self._answer(400, {"error": f"unknown or missing fields {sorted(request)}"})
        for end, name in request.items():
            if not re.fullmatch(MODEL_NAME, name):
                return self._answer(400, {"error": f"{end} {name!r} is invalid"})
        if request["source"] not in self.server.models:
            return self._answer(404, {"error": f"model {request['source']!r} not found"})
        # A name that is taken is given to the copy.
        self.server.models[request["destination"]] = self.server.models[request["source"]]
        return self._answer(200)

    def _chat(self, request: dict[str, Any]) -> None:
        if request["model"] not in self.server.models:
            return self._answer(404, {"error": f"model {request['model']!r} not found"})
        message = {"role": "assistant", "content": "Hi"}
        done = self.server.fault != "silent"
        return self._answer(200, {"model": request["model"], "message": message, "done": done})
