"""The API over HTTP: the paths that the Kubernetes client calls for Jobs, pods, logs and events."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import Counter
from contextlib import suppress
from functools import reduce
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.kubernetes.admission import admit
from tests.kubernetes.kubelet import Kubelet
from tests.kubernetes.objects import KINDS, Object, Objects, RefusedError, labels, now
from tests.kubernetes.rbac import Accounts

_PATH = re.compile(r"/(?:api|apis/(batch))/v1/namespaces/([^/]+)/(jobs|pods|events)(?:/([^/]+))?(?:/(status|log))?")
_VERBS = {"GET": "get", "POST": "create", "DELETE": "delete"}


class Server:
    """An API server on loopback that can go away and come back under its address."""

    def __init__(self, objects: Objects, accounts: Accounts, kubelet: Kubelet) -> None:
        self._objects, self._accounts, self._kubelet = objects, accounts, kubelet
        # How often each verb on each resource was called, and how often each was refused.
        self.calls: Counter[str] = Counter()
        self.refusals: list[str] = []
        self._open: set[socket.socket] = set()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server._open.add(self.connection)

            def finish(self) -> None:
                server._open.discard(self.connection)
                with suppress(OSError):
                    super().finish()

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                url = urlsplit(self.path)
                token = self.headers.get("Authorization")
                try:
                    answer = server.serve(token, self.command, url.path, dict(parse_qsl(url.query)), body)
                    code = 201 if self.command == "POST" else 200
                except RefusedError as refused:
                    server.refusals.append(f"{self.command} {url.path}: {refused.code} {refused.message}")
                    answer, code = refused.status, refused.code
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Type", "text/plain" if isinstance(answer, bytes) else "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = answer  # noqa: N815 - the names that http.server calls

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: Any) -> None:
                """Connections break when the server goes away."""

        self._http = Listener(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.05,), name="kubernetes-api", daemon=True).start()

    def stop(self) -> None:
        """Go away: nothing listens, and open connections break."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def serve(
        self, token: str | None, method: str, path: str, query: dict[str, str], body: Object | None
    ) -> Object | bytes:
        match = _PATH.fullmatch(path)
        if match is None or method not in _VERBS:
            raise RefusedError(404, "NotFound", f"the server could not find the requested resource: {method} {path}")
        group, namespace, resource, name, part = match.groups()
        verb = "list" if method == "GET" and name is None else _VERBS[method]
        called = f"{resource}/{part}" if part else resource
        self.calls[f"{verb} {called}"] += 1
        self._accounts.check(token, verb, group or "", called)
        with self._objects.lock:
            if verb == "list":
                return self._list(resource, namespace, query)
            if verb == "create":
                return self._create(resource, namespace, body or {})
            found = self._objects.get(resource, namespace, name)
            if part == "log":
                return self._kubelet.log(found, query.get("tailLines"))
            if verb == "delete":
                self._delete(resource, found, query, body or {})
            return found

    def _list(self, resource: str, namespace: str, query: dict[str, str]) -> Object:
        by_label, by_field = _pairs(query.get("labelSelector", "")), _pairs(query.get("fieldSelector", ""))
        items = [
            item
            for item in self._objects.all(resource)
            if item["metadata"]["namespace"] == namespace
            and all(labels(item).get(name) in values for name, values in by_label)
            and all(_field(item, name) in values for name, values in by_field)
        ]
        kind, version = KINDS[resource]
        return {"kind": f"{kind}List", "apiVersion": version, "metadata": {"resourceVersion": "1"}, "items": items}

    def _create(self, resource: str, namespace: str, body: Object) -> Object:
        if resource != "jobs":
            raise RefusedError(405, "MethodNotAllowed", f"nobody creates {resource} here")
        admit(body)
        return self._objects.add(resource, namespace, body, startTime=now())

    def _delete(self, resource: str, found: Object, query: dict[str, str], body: Object) -> None:
        if resource == "pods":
            self._kubelet.delete(found)
            return
        # Unless told otherwise, batch/v1 leaves a Job's pods alone.
        policy = query.get("propagationPolicy") or body.get("propagationPolicy") or "Orphan"
        for pod in list(self._objects.all("pods")):
            references = pod["metadata"].get("ownerReferences") or []
            if any(reference["uid"] == found["metadata"]["uid"] for reference in references):
                if policy == "Orphan":
                    del pod["metadata"]["ownerReferences"]
                else:
                    self._kubelet.delete(pod)
        self._objects.remove(resource, found["metadata"]["namespace"], found["metadata"]["name"])


def _pairs(selector: str) -> list[tuple[str, set[str]]]:
    """``a=b,c in (d,e)`` as names and the values that they may have."""
    found = []
    for name, operator, rest in re.findall(r"([^\s,=()]+)\s*(==|=|\sin\s)\s*(\([^)]*\)|[^,]*)", selector):
        values = rest.strip("()").split(",") if operator.strip() == "in" else [rest]
        found.append((name, {value.strip() for value in values}))
    return found


def _field(item: Object, path: str) -> Any:
    return reduce(lambda value, name: (value or {}).get(name), path.split("."), item)
