"""Runs pods: each one's container is a process with the manifest's environment, its volumes are directories."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kubernetes.image import Image, Process
from tests.kubernetes.nodes import Node
from tests.kubernetes.objects import Object, Objects, RefusedError, is_over, now


@dataclass
class Container:
    """A container that was started."""

    process: Process
    log: Path
    started: str
    # Why it was killed, if the cluster did it.
    reason: str | None = None
    kill_at: float | None = None
    gone: bool = False


class _NotYetError(Exception):
    """A container waits, for the reason that the API shows."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Kubelet:
    """The kubelets of all nodes.

    Args:
        objects: the cluster's.
        nodes: by name.
        directory: for logs and the volumes that live as long as their pod.
        claims: the directory of each persistent volume claim.
        config_maps: the values of each ConfigMap.
        secrets: the values of each Secret.
        environment: what images and the cluster itself set in every container.
    """

    def __init__(
        self,
        objects: Objects,
        nodes: dict[str, Node],
        directory: Path,
        claims: dict[str, Path],
        config_maps: dict[str, dict[str, str]],
        secrets: dict[str, dict[str, str]],
        environment: dict[str, str],
    ) -> None:
        self._objects, self._nodes, self._directory = objects, nodes, directory
        self._claims, self._config_maps, self._secrets = claims, config_maps, secrets
        self._environment = environment
        self.kubeconfigs: dict[str, Path] = {}
        # What the registry has, and what of it cannot be pulled.
        self.images: dict[str, Image] = {}
        self.missing_images: set[str] = set()
        self._containers: dict[str, Container] = {}

    def tick(self) -> None:
        for pod in self._objects.all("pods"):
            uid, node = pod["metadata"]["uid"], self._nodes.get(pod["spec"].get("nodeName", ""))
            if node is None or node.down:
                continue
            container = self._containers.get(uid)
            if container is None:
                if pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in pod["metadata"]:
                    self._start(pod)
            elif not is_over(pod):
                self._look_after(pod, container)

    def _start(self, pod: Object) -> None:
        spec = pod["spec"]["containers"][0]
        try:
            if spec["image"] not in self.images or spec["image"] in self.missing_images:
                raise _NotYetError("ImagePullBackOff", f'Back-off pulling image "{spec["image"]}": not found')
            mounts = self._mounts(pod)
            environment = self._environment_of(pod, spec, mounts)
        except _NotYetError as waits:
            self._objects.event(pod, "Failed", waits.message)
            _show(pod, waiting={"reason": waits.reason, "message": waits.message})
            return
        log = self._directory / f"{pod['metadata']['name']}.log"
        log.touch()
        arguments = [*(spec.get("command") or []), *(spec.get("args") or [])]
        account = pod["spec"].get("serviceAccountName", "default")
        if pod["spec"].get("automountServiceAccountToken", True) and account in self.kubeconfigs:
            # What a service account's token directory is in a real pod.
            shutil.copy(self.kubeconfigs[account], self._own(pod) / "kubeconfig")
        process = self.images[spec["image"]].start(arguments, environment, self._own(pod), log)
        container = Container(process, log, now())
        self._containers[pod["metadata"]["uid"]] = container
        pod["status"]["phase"] = "Running"
        pod["status"]["startTime"] = container.started
        _show(pod, running={"startedAt": container.started})

    def _look_after(self, pod: Object, container: Container) -> None:
        code = container.process.poll()
        if code is None:
            if container.kill_at is not None and time.monotonic() > container.kill_at:
                container.process.kill()
            return
        code = 128 - code if code < 0 else code
        reason = container.reason or ("Error" if code else "Completed")
        ended = {"exitCode": code, "reason": reason, "startedAt": container.started, "finishedAt": now()}
        _show(pod, terminated=ended)
        pod["status"]["phase"] = "Failed" if code else "Succeeded"
        # What the container's first process has started dies with it.
        container.process.kill()
        if "deletionTimestamp" in pod["metadata"]:
            self.forget(pod)

    def delete(self, pod: Object) -> None:
        """Ask a pod to end, as a deletion does: SIGTERM, and SIGKILL when its grace is over."""
        if "deletionTimestamp" in pod["metadata"]:
            return
        pod["metadata"]["deletionTimestamp"] = now()
        container = self._containers.get(pod["metadata"]["uid"])
        if container is None or is_over(pod):
            self.forget(pod)
            return
        self._objects.event(pod, "Killing", "Stopping container", kind="Normal")
        container.kill_at = time.monotonic() + pod["spec"].get("terminationGracePeriodSeconds", 30)
        container.process.terminate()

    def kill(self, pod: Object, reason: str) -> None:
        """End a container at once."""
        container = self._containers[pod["metadata"]["uid"]]
        container.reason = reason
        container.process.kill()

    def freeze(self, pod: Object) -> None:
        """Let a container stand still until it is asked to end."""
        self._containers[pod["metadata"]["uid"]].process.freeze()

    def forget(self, pod: Object) -> None:
        """Remove a pod from the API, and what lived as long as it."""
        self._objects.remove("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        shutil.rmtree(self._own(pod), ignore_errors=True)

    def is_running(self, pod: Object) -> bool:
        """Whether the pod's process lives, whatever the API says."""
        container = self._containers.get(pod["metadata"]["uid"])
        return container is not None and container.process.poll() is None

    def log(self, pod: Object, tail: str | None) -> bytes:
        container = self._containers.get(pod["metadata"]["uid"])
        if container is None:
            raise RefusedError(400, "BadRequest", "container is waiting to start")
        lines = container.log.read_bytes().splitlines(keepends=True)
        return b"".join(lines[-int(tail) :] if tail else lines)

    def close(self) -> None:
        for container in self._containers.values():
            container.process.kill()
            container.process.wait()
        for image in self.images.values():
            image.close()

    def _own(self, pod: Object) -> Path:
        directory = self._directory / pod["metadata"]["uid"]
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _mounts(self, pod: Object) -> dict[str, str]:
        """The directory that stands for each mount path."""
        directories: dict[str, Path] = {}
        for volume in pod["spec"].get("volumes") or []:
            own = self._own(pod) / volume["name"]
            if "persistentVolumeClaim" in volume:
                directories[volume["name"]] = self._claims[volume["persistentVolumeClaim"]["claimName"]]
            elif "emptyDir" in volume:
                own.mkdir(exist_ok=True)
                directories[volume["name"]] = own
            else:
                raise _NotYetError("CreateContainerConfigError", f"volume {volume['name']}: no such kind here")
        mounts = pod["spec"]["containers"][0].get("volumeMounts") or []
        return {mount["mountPath"]: str(directories[mount["name"]] / mount.get("subPath", "")) for mount in mounts}

    def _environment_of(self, pod: Object, spec: Object, mounts: dict[str, str]) -> dict[str, str]:
        values: dict[str, str] = {}
        for source in spec.get("envFrom") or []:
            for kind, known in (("configMapRef", self._config_maps), ("secretRef", self._secrets)):
                if kind in source:
                    values |= _found(known, source[kind]["name"])
        for variable in spec.get("env") or []:
            reference = (variable.get("valueFrom") or {}).get("secretKeyRef")
            if reference:
                values[variable["name"]] = _found(self._secrets, reference["name"])[reference["key"]]
            else:
                values[variable["name"]] = variable.get("value") or ""
        # There are no containers here: what names a mount path gets the directory that stands for it.
        values = {name: _mapped(value, mounts) for name, value in values.items()}
        if "/tmp" in mounts:
            values["TMPDIR"] = mounts["/tmp"]
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
            **self._environment,
            **values,
            "HOSTNAME": pod["metadata"]["name"],
        }


def _found(known: dict[str, dict[str, str]], name: str) -> dict[str, str]:
    if name not in known:
        raise _NotYetError("CreateContainerConfigError", f'"{name}" not found')
    return known[name]


def _mapped(value: str, mounts: dict[str, str]) -> str:
    for path, directory in mounts.items():
        if value == path or value.startswith(f"{path}/"):
            return directory + value.removeprefix(path)
    return value


def _show(pod: Object, **state: Any) -> None:
    """What the API tells of the pod's container."""
    spec = pod["spec"]["containers"][0]
    pod["status"]["containerStatuses"] = [
        {
            "name": spec["name"],
            "image": spec["image"],
            "imageID": "",
            "ready": "running" in state,
            "restartCount": 0,
            "state": state,
        }
    ]
