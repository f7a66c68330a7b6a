"""A Kubernetes of one process: API server, Job controller, scheduler, kubelets, and what may go wrong with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from tests.kubernetes.controllers import JobController
from tests.kubernetes.kubelet import Kubelet
from tests.kubernetes.nodes import Node, Scheduler
from tests.kubernetes.objects import Object, Objects, is_over, labels
from tests.kubernetes.rbac import Accounts
from tests.kubernetes.server import Server

# Kubernetes gives a node 5 minutes to come back before it gives up its pods; here nobody waits for that.
EVICTION_SECONDS = 2.0


class Cluster:
    """A cluster that runs for the block.

    Args:
        directory: for everything that it writes.
        nodes: its machines.
        rules: the rules of each service account's Role.
        namespace: the one that its kubeconfigs name.
    """

    def __init__(
        self, directory: Path, nodes: Sequence[Node], rules: dict[str, Sequence[Object]], namespace: str
    ) -> None:
        self.directory, self.namespace = directory, namespace
        directory.mkdir(parents=True)
        self.objects = Objects()
        self.nodes = {node.name: node for node in nodes}
        self.claims: dict[str, Path] = {}
        self.config_maps: dict[str, dict[str, str]] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self.environment: dict[str, str] = {"HOME": str(directory), "LANG": "C.UTF-8"}
        self.kubelet = Kubelet(
            self.objects, self.nodes, directory / "pods", self.claims, self.config_maps, self.secrets, self.environment
        )
        (directory / "pods").mkdir()
        accounts = Accounts(rules)
        self.server = Server(self.objects, accounts, self.kubelet)
        for account in rules:
            self.kubelet.kubeconfigs[account] = self._kubeconfig(account, accounts.token(account))
        # Pods as they came and went: name, labels, start and end.
        self.history: dict[str, PodHistory] = {}
        self._stopped = threading.Event()
        self._lost: dict[str, float] = {}

    def __enter__(self) -> Self:
        self.environment["KUBERNETES_SERVICE_HOST"] = "127.0.0.1"
        self._thread = threading.Thread(target=self._run, name="kubernetes", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()
        self.server.stop()
        self.kubelet.close()

    def _run(self) -> None:
        jobs = JobController(self.objects, self.kubelet)
        scheduler = Scheduler(self.objects, self.nodes, self.claims)
        while not self._stopped.wait(0.05):
            with self.objects.lock:
                jobs.tick()
                scheduler.tick()
                self.kubelet.tick()
                self._evict()
                self._record()

    def _kubeconfig(self, account: str, token: str) -> Path:
        path = self.directory / f"kubeconfig-{account}"
        context = {"cluster": "cluster", "user": account, "namespace": self.namespace}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "cluster", "cluster": {"server": self.server.url}}],
            "users": [{"name": account, "user": {"token": token}}],
            "contexts": [{"name": "context", "context": context}],
            "current-context": "context",
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def pods(self, **wanted: str) -> list[Object]:
        """Pods by labels (``op``, ``run_id``, ... of Dagster's) that are not over."""
        names = {f"dagster/{name.replace('_', '-')}": value for name, value in wanted.items()}
        return [pod for pod in self.objects.all("pods") if names.items() <= labels(pod).items() and not is_over(pod)]

    def jobs(self) -> list[Object]:
        return list(self.objects.all("jobs"))

    def delete_pod(self, pod: Object) -> None:
        """What `kubectl delete pod` does, and a drained node."""
        with self.objects.lock:
            self.kubelet.delete(pod)

    def kill(self, pod: Object, reason: str = "Error") -> None:
        """End a pod's container by SIGKILL, such as for want of memory (``OOMKilled``)."""
        with self.objects.lock:
            self.kubelet.kill(pod, reason)

    def freeze(self, pod: Object) -> None:
        """Let a pod's container stand still, as if its work took long."""
        self.kubelet.freeze(pod)

    def recover_node(self, name: str) -> None:
        """A machine is back, empty."""
        with self.objects.lock:
            self.nodes[name].down = False

    def lose_node(self, name: str) -> None:
        """A machine dies: its processes are gone at once, its pods once the cluster gives it up."""
        with self.objects.lock:
            self.nodes[name].down = True
            for pod in self.objects.all("pods"):
                if pod["spec"].get("nodeName") == name and self.kubelet.is_running(pod):
                    self.kubelet.kill(pod, "NodeLost")
            self._lost[name] = time.monotonic()

    def _evict(self) -> None:
        for name, since in list(self._lost.items()):
            if time.monotonic() - since > EVICTION_SECONDS:
                for pod in self.objects.all("pods"):
                    if pod["spec"].get("nodeName") == name:
                        self.kubelet.forget(pod)
                del self._lost[name]

    def _record(self) -> None:
        present = set()
        for pod in self.objects.all("pods"):
            name = pod["metadata"]["name"]
            present.add(name)
            known = self.history.setdefault(name, PodHistory(name, labels(pod), pod))
            if self.kubelet.is_running(pod):
                known.start = known.start or time.monotonic()
                known.end = None
            elif known.start:
                known.end = known.end or time.monotonic()
        for name, known in self.history.items():
            if name not in present and known.start and not self.kubelet.is_running(known.pod):
                known.end = known.end or time.monotonic()


class PodHistory:
    """When a pod's process ran, by the monotonic clock."""

    def __init__(self, name: str, pod_labels: dict[str, str], pod: Object) -> None:
        self.name, self.labels, self.pod = name, pod_labels, pod
        self.start: float | None = None
        self.end: float | None = None
