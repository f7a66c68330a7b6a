"""A strict little server of the four calls, on loopback, that can be told to misbehave."""

import email.message
import email.parser
import hashlib
import io
import json
import socket
import struct
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "top-secret-key-5f1b"
LOG = "step 7\nCUDA out of memory\n"


def adapter_files(rank: int = 4) -> dict[str, bytes]:
    """A LoRA adapter in PEFT's layout, its safetensors written by hand."""
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"]
    data = [struct.pack(f"<{rank * 8}f", *(0.25 * i for i in range(rank * 8))), bytes(4 * 8 * rank)]
    header = json.dumps(
        {
            names[0]: {"dtype": "F32", "shape": [rank, 8], "data_offsets": [0, len(data[0])]},
            names[1]: {"dtype": "F32", "shape": [8, rank], "data_offsets": [len(data[0]), sum(map(len, data))]},
        }
    ).encode()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config["base_model_name_or_path"] = "/srv/h2o/models/x"
    log = "".join(json.dumps({"step": step, "loss": 2.0 / step, "learning_rate": 1e-4}) + "\n" for step in range(1, 5))
    return {
        "adapter_model/adapter_model.safetensors": struct.pack("<Q", len(header)) + header + b"".join(data),
        "adapter_model/adapter_config.json": json.dumps(config).encode(),
        "adapter_model/training_log.jsonl": log.encode(),
    }


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            zipped.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


Fault = Callable[["Handler"], bool]
"""Runs in place of, or before, the ordinary answer; True if it has answered."""


def says(status: int, body: bytes = b'{"detail": "no"}', **headers: str) -> Fault:
    def fault(handler: "Handler") -> bool:
        handler.drain()
        handler.reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def resets(handler: "Handler") -> bool:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
    return True


def loses_the_answer(handler: "Handler") -> bool:
    """The deed is done, the connection breaks before the answer."""
    handler.mute = True
    return False


def truncates(handler: "Handler") -> bool:
    """Announces everything and sends half of it."""
    handler.half = True
    return False


def half_closes(handler: "Handler") -> bool:
    """Ends its own side in the middle of the headers, and keeps the connection for the other's."""
    handler.drain()
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Len")
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_WR)
    handler.connection.recv(1)
    handler.close_connection = True
    return True


def flips_a_bit(handler: "Handler") -> bool:
    handler.flip = True
    return False


def drips(handler: "Handler") -> bool:
    """One byte now and then, for ever."""
    handler.drain()
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.02)
    except OSError:
        handler.close_connection = True
    return True


class H2OServer:
    """State and switches; `url` is where it listens."""

    def __init__(self) -> None:
        self.key = KEY
        self.datasets: dict[str, dict[str, Any]] = {}
        self.uploaded: dict[str, bytes] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.archive = archive(adapter_files())
        self.total_steps = 4
        self.outcome: dict[str, Any] = {"status": "finished"}
        self.hold = threading.Event()
        self.hold.set()
        self.lists = True
        self.idempotent = True
        self.etag: str | None = '"v1"'
        self.ranges = True
        self.tells_sha256 = True
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.struck: list[str] = []
        self.calls: list[str] = []
        self.authorizations: list[str | None] = []
        self.range_headers: list[str | None] = []
        self.downloaded = threading.Event()
        self.lock = threading.RLock()
        # The names of another edition: paths' first part, fields and statuses.
        self.base = "api"
        self.names: dict[str, str] = {}
        # What every answer about an experiment says beside the rest.
        self.extra: dict[str, Any] = {}
        self.port = 0
        self.open()

    def open(self) -> None:
        """Listen, where it listened before."""
        self.listener = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (Handler,), {"state": self}))
        self.listener.daemon_threads = True
        self.port = self.listener.server_address[1]
        threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Refuse connections."""
        self.listener.shutdown()
        self.listener.server_close()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.archive).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes, of which the second would wait for the first's acknowledgement.
    disable_nagle_algorithm = True
    state: H2OServer
    mute = half = flip = False

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self.dispatch("GET")

    def do_POST(self) -> None:
        self.dispatch("POST")

    def dispatch(self, method: str) -> None:
        self.mute = self.half = self.flip = False
        self.body: bytes | None = None
        state = self.state
        parts = urlsplit(self.path)
        segments = parts.path.strip("/").split("/")
        match (method, *segments):
            case ("POST", self.state.base, "datasets"):
                call, run = "upload", self.upload
            case ("POST", self.state.base, "experiments"):
                call, run = "create", self.create
            case ("GET", self.state.base, "experiments"):
                call, run = "list", lambda: self.list(parse_qs(parts.query))
            case ("GET", self.state.base, "experiments", identifier):
                call, run = "poll", lambda: self.poll(identifier)
            case ("GET", self.state.base, "experiments", identifier, "download"):
                call, run = "download", lambda: self.download(identifier)
            case ("POST", self.state.base, "experiments", identifier, "cancel"):
                call, run = "cancel", lambda: self.cancel(identifier)
            case _:
                call, run = "unknown", lambda: self.reply(404, b'{"detail": "no such route"}')
        with state.lock:
            state.calls.append(call)
            state.authorizations.append(self.headers.get("Authorization"))
            fault = state.faults[call].pop(0) if state.faults[call] else None
            if fault is not None:
                state.struck.append(call)
        if fault is not None and fault(self):
            return
        if self.headers.get("Authorization") != f"Bearer {state.key}":
            self.drain()
            self.reply(401, b'{"detail": "unknown key"}')
            return
        run()

    def drain(self) -> bytes:
        if self.body is None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                self.body = b"".join(chunks)
            else:
                self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self.body

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self.mute:
            resets(self)
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.flip:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.half:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(body)

    def json(self, status: int, value: Any) -> None:
        self.reply(status, json.dumps(self.in_its_words(value)).encode())

    def in_its_words(self, value: Any) -> Any:
        names = self.state.names
        if isinstance(value, list):
            return [self.in_its_words(item) for item in value]
        if isinstance(value, dict):
            said = {names.get(name, name): self.in_its_words(item) for name, item in value.items()}
            if "status" in value:
                said[names.get("status", "status")] = names.get(value["status"], value["status"])
            return said
        return value

    def in_our_words(self, value: dict[str, Any]) -> dict[str, Any]:
        ours = {theirs: name for name, theirs in self.state.names.items()}
        return {ours.get(name, name): item for name, item in value.items()}

    def upload(self) -> None:
        message = email.parser.BytesParser().parsebytes(
            b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + self.drain()
        )
        fields: dict[str, bytes] = {}
        for part in message.get_payload():
            assert isinstance(part, email.message.Message)
            name = part.get_param("name", header="Content-Disposition")
            fields[str(name)] = part.get_payload(decode=True)  # type: ignore[assignment]
        fields = self.in_our_words(fields)
        digest = hashlib.sha256(fields["file"]).hexdigest()
        if digest != fields["sha256"].decode() or self.headers.get("Idempotency-Key") != digest:
            self.json(422, {"detail": "the file does not match its SHA-256"})
            return
        with self.state.lock:
            known = [key for key, value in self.state.datasets.items() if value["sha256"] == digest]
            identifier = known[0] if known else f"ds-{len(self.state.datasets) + 1}"
            self.state.datasets[identifier] = {"id": identifier, "sha256": digest, "name": fields["name"].decode()}
            self.state.uploaded[identifier] = fields["file"]
        self.json(201, self.state.datasets[identifier])

    def create(self) -> None:
        body = self.in_our_words(json.loads(self.drain()))
        key = self.headers.get("Idempotency-Key")
        with self.state.lock:
            if body.get("dataset_id") not in self.state.datasets or body.get("idempotency_key") != key or not key:
                self.json(422, {"detail": "unknown dataset or key"})
                return
            known = [e for e in self.state.experiments.values() if e["idempotency_key"] == key]
            if known and self.state.idempotent:
                self.json(200, known[0])
                return
            identifier = f"exp/{len(self.state.experiments) + 1}"
            experiment = {
                "id": identifier,
                "idempotency_key": key,
                "status": "queued",
                "step": 0,
                "total_steps": self.state.total_steps,
                "metrics": {},
                "body": body,
            }
            self.state.experiments[identifier] = experiment
        self.json(201, experiment | self.state.extra)

    def list(self, query: dict[str, list[str]]) -> None:
        if not self.state.lists:
            self.reply(405, b'{"detail": "Method Not Allowed"}')
            return
        wanted = self.in_our_words(query).get("idempotency_key", [""])[0]
        self.json(200, {"experiments": [e for e in self.state.experiments.values() if e["idempotency_key"] == wanted]})

    def poll(self, identifier: str) -> None:
        state = self.state
        experiment = state.experiments.get(identifier.replace("%2F", "/"))
        if experiment is None:
            self.json(404, {"detail": "no such experiment"})
            return
        with state.lock:
            if experiment["status"] in ("queued", "running") and state.hold.is_set():
                experiment["status"] = "running"
                experiment["step"] += 1
                experiment["metrics"] = {"loss": 2.0 / experiment["step"], "gpu_hours": 0.5, "note": "text"}
                if experiment["step"] >= state.total_steps:
                    experiment.update(state.outcome)
            if experiment["status"] == "finished" and state.tells_sha256:
                experiment["sha256"] = state.sha256
        self.json(200, experiment | state.extra)

    def download(self, identifier: str) -> None:
        experiment = self.state.experiments.get(identifier.replace("%2F", "/"))
        if experiment is None or experiment["status"] != "finished":
            self.json(409, {"detail": "not finished"})
            return
        content, wanted = self.state.archive, self.headers.get("Range")
        self.state.range_headers.append(wanted)
        headers = {"ETag": self.state.etag} if self.state.etag else {}
        unchanged = self.headers.get("If-Range") in (None, self.state.etag)
        self.state.downloaded.set()
        if wanted and self.state.ranges and unchanged:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.reply(206, content[start:], headers)
            return
        self.reply(200, content, headers)

    def cancel(self, identifier: str) -> None:
        experiment = self.state.experiments[identifier.replace("%2F", "/")]
        experiment["status"] = "stopped"
        self.json(200, experiment)
