"""What the cluster keeps: its objects, by kind, namespace and name, as the API's JSON."""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]
# The kinds that the API serves, by the resource's name in the path, and each one's API version.
KINDS = {"jobs": ("Job", "batch/v1"), "pods": ("Pod", "v1"), "events": ("Event", "v1")}


class RefusedError(Exception):
    """An answer of the API that is no success."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message

    @property
    def status(self) -> Object:
        """The body of the answer."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "code": self.code,
            "reason": self.reason,
            "message": self.message,
        }


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Objects:
    """All objects; whoever changes several at once holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._version = 0

    def add(self, resource: str, namespace: str, body: Object, **status: Any) -> Object:
        name = body["metadata"]["name"]
        with self.lock:
            if (resource, namespace, name) in self._objects:
                raise RefusedError(409, "AlreadyExists", f'{resource} "{name}" already exists')
            self._version += 1
            kind, version = KINDS[resource]
            made = copy.deepcopy(body) | {"kind": kind, "apiVersion": version}
            made["metadata"] |= {
                "namespace": namespace,
                "uid": str(uuid.uuid4()),
                "creationTimestamp": now(),
                "resourceVersion": str(self._version),
            }
            if status:
                made["status"] = status
            self._objects[resource, namespace, name] = made
            return made

    def get(self, resource: str, namespace: str, name: str) -> Object:
        try:
            return self._objects[resource, namespace, name]
        except KeyError:
            raise RefusedError(404, "NotFound", f'{resource} "{name}" not found') from None

    def remove(self, resource: str, namespace: str, name: str) -> None:
        with self.lock:
            self._objects.pop((resource, namespace, name), None)

    def all(self, resource: str) -> Iterator[Object]:
        with self.lock:
            found = [each for (kind, _, _), each in self._objects.items() if kind == resource]
        yield from found

    def event(self, about: Object, reason: str, message: str, kind: str = "Warning") -> None:
        """Record an event, or count it once more."""
        with self.lock:
            for known in self.all("events"):
                same = known["involvedObject"]["uid"] == about["metadata"]["uid"]
                if same and (known["reason"], known["message"]) == (reason, message):
                    known["count"] += 1
                    known["lastTimestamp"] = now()
                    return
            metadata = about["metadata"]
            self.add(
                "events",
                metadata["namespace"],
                {
                    "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:12]}"},
                    "involvedObject": {
                        "kind": about["kind"],
                        "name": metadata["name"],
                        "namespace": metadata["namespace"],
                        "uid": metadata["uid"],
                    },
                    "type": kind,
                    "reason": reason,
                    "message": message,
                    "count": 1,
                    "firstTimestamp": now(),
                    "lastTimestamp": now(),
                },
            )


def is_over(pod: Object) -> bool:
    return pod["status"]["phase"] in ("Succeeded", "Failed")


def labels(item: Object) -> dict[str, str]:
    return item["metadata"].get("labels") or {}


def owned_by(item: Object, owner: Object) -> bool:
    references = item["metadata"].get("ownerReferences") or []
    return any(reference["uid"] == owner["metadata"]["uid"] for reference in references)
