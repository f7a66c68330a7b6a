"""The hub's calls that a push needs, in this process: strict, and with its protocol of commits.

After huggingface_hub 2.4: repos/create, validate-yaml, preupload, the LFS batch API
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md), commit as NDJSON, paths-info.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import yaml

TOKEN = "hf_" + "s3cr3t" * 6


@dataclass
class Repo:
    """A repository: its files at the newest commit, those in LFS as their SHA-256."""

    private: bool
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    files: dict[str, bytes] = field(default_factory=dict)
    pointers: dict[str, str] = field(default_factory=dict)


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        # what to go wrong with: "denied", "busy", "corrupt"
        self.fault = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def content(self, repo: str, path: str) -> bytes:
        found = self.repos[repo]
        return self.stored[found.pointers[path]] if path in found.pointers else found.files[path]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Tests read `requests` instead."""

    def _answer(self, status: int, body: object = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_PUT(self) -> None:
        body = self._body()
        self.server.requests.append(f"PUT {self.path}")
        oid = self.path.removeprefix("/lfs/")
        if "Authorization" in self.headers:
            return self._answer(400, {"error": "signed addresses take no token"})
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "checksum mismatch"})
        self.server.stored[oid] = body
        return self._answer(200)

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.server.fault == "denied":
            return self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path == "/lfs/verify":
            known = self.server.stored.get(json.loads(body)["oid"])
            return self._answer(200 if known is not None and len(known) == json.loads(body)["size"] else 404)
        self._answer_for_repository(path, body)
        return None

    def _answer_for_repository(self, path: str, body: bytes) -> None:
        match = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(/[a-z].*|)", path)
        repo = self.server.repos.get(match[1]) if match else None
        if match is None or repo is None:
            return self._answer(404, {"error": "Repository not found"})
        if self.command == "GET":
            about = {"id": match[1], "sha": repo.commits[-1], "private": repo.private, "siblings": []}
            return self._answer(200, about)
        if match[2] == "/preupload/main":
            return self._preupload(repo, json.loads(body)["files"])
        if match[2] == "/info/lfs/objects/batch":
            return self._batch(json.loads(body))
        if match[2] == "/commit/main":
            return self._commit(match[1], repo, [json.loads(line) for line in body.splitlines()])
        if match[2] == f"/paths-info/{repo.commits[-1]}":
            return self._paths(repo, parse_qs(body.decode())["paths"])
        return self._answer(404, {"error": "no such call"})

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}"
        if name in self.server.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": name})
        self.server.repos[name] = Repo(private=request["visibility"] == "private")
        return self._answer(200, {"url": f"{self.server.address}/{name}"})

    def _validate(self, card: str) -> None:
        stated = yaml.safe_load(card.split("---")[1])
        errors = []
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", stated.get("base_model", "none")):
            errors.append({"message": '"base_model" is not the id of a model'})
        return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, repo: Repo, files: list[dict[str, Any]]) -> None:
        told = []
        for file in files:
            path = file["path"]
            large = path.endswith((".safetensors", ".gguf", ".png"))
            oid = repo.pointers.get(path) if large else git_blob(repo.files[path]) if path in repo.files else None
            mode = "lfs" if large else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | ({"oid": oid} if oid else {}))
        self._answer(200, {"files": told})

    def _batch(self, request: dict[str, Any]) -> None:
        if (request["operation"], request["hash_algo"]) != ("upload", "sha256"):
            return self._answer(422, {"message": "upload by sha256 alone"})
        told: list[dict[str, Any]] = []
        for wanted in request["objects"]:
            told.append(dict(wanted))
            if wanted["oid"] not in self.server.stored:
                told[-1]["actions"] = {
                    "upload": {"href": f"{self.server.address}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.server.address}/lfs/verify"},
                }
        return self._answer(200, {"transfer": "basic", "objects": told})

    def _commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        if self.server.fault == "busy":
            return self._answer(503, {"error": "Service unavailable"})
        header, *operations = lines
        if header["key"] != "header" or not header["value"]["summary"]:
            return self._answer(400, {"error": "a commit begins with its summary"})
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                content = base64.b64decode(value["content"])
                repo.files[value["path"]] = content[:-1] if self.server.fault == "corrupt" else content
            elif operation["key"] == "lfsFile" and value["oid"] in self.server.stored:
                repo.pointers[value["path"]] = value["oid"]
            else:
                return self._answer(400, {"error": f"{value['path']} was not uploaded"})
        repo.commits.append(hashlib.sha1(json.dumps(lines).encode()).hexdigest())
        oid = repo.commits[-1]
        return self._answer(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{name}/commit/{oid}"}
        )

    def _paths(self, repo: Repo, paths: list[str]) -> None:
        told: list[dict[str, Any]] = []
        for path in paths:
            if path in repo.pointers:
                oid = repo.pointers[path]
                size = len(self.server.stored[oid])
                lfs = {"oid": oid, "size": size, "pointerSize": 134}
                told.append({"type": "file", "path": path, "size": size, "oid": "1" * 40, "lfs": lfs})
            elif path in repo.files:
                content = repo.files[path]
                told.append({"type": "file", "path": path, "size": len(content), "oid": git_blob(content)})
        self._answer(200, told)
