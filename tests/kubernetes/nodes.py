"""Nodes and the scheduler: where a pod may run, by selector, taints and free GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.kubernetes.admission import quantity
from tests.kubernetes.objects import Object, Objects, is_over

GPU = "nvidia.com/gpu"
GPU_TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}


@dataclass
class Node:
    """A machine of the cluster; one that is down runs nothing and hears nothing."""

    name: str
    gpus: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    taints: list[dict[str, str]] = field(default_factory=list)
    down: bool = False


def gpus(pod: Object) -> int:
    """How many GPUs a pod asks for."""
    return sum(
        int(quantity(((container.get("resources") or {}).get("limits") or {}).get(GPU, 0)))
        for container in pod["spec"]["containers"]
    )


class Scheduler:
    """Binds pending pods to nodes; says of the others why they have none."""

    def __init__(self, objects: Objects, nodes: dict[str, Node], claims: Sequence[str]) -> None:
        self._objects, self._nodes, self._claims = objects, nodes, claims

    def tick(self) -> None:
        for pod in self._objects.all("pods"):
            if pod["status"]["phase"] != "Pending" or "nodeName" in pod["spec"]:
                continue
            refusals = []
            if missing := self._missing_claims(pod):
                refusals.append(f'persistentvolumeclaim "{missing[0]}" not found')
            for node in [] if missing else self._nodes.values():
                reason = self._refusal(pod, node)
                if reason is None:
                    pod["spec"]["nodeName"] = node.name
                    pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]
                    break
                refusals.append(reason)
            else:
                message = f"0/{len(self._nodes)} nodes are available: {', '.join(sorted(set(refusals)))}."
                condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
                pod["status"]["conditions"] = [condition]
                self._objects.event(pod, "FailedScheduling", message)

    def _missing_claims(self, pod: Object) -> list[str]:
        volumes = pod["spec"].get("volumes") or []
        claims = [volume["persistentVolumeClaim"] for volume in volumes if "persistentVolumeClaim" in volume]
        return [claim["claimName"] for claim in claims if claim["claimName"] not in self._claims]

    def _refusal(self, pod: Object, node: Node) -> str | None:
        if node.down:
            return "node(s) were not ready"
        wanted = pod["spec"].get("nodeSelector") or {}
        if not wanted.items() <= node.labels.items():
            return "node(s) didn't match Pod's node affinity/selector"
        tolerations = pod["spec"].get("tolerations") or []
        for taint in node.taints:
            if not any(_tolerates(toleration, taint) for toleration in tolerations):
                return f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"
        used = sum(
            gpus(other)
            for other in self._objects.all("pods")
            if other["spec"].get("nodeName") == node.name and not is_over(other)
        )
        return f"Insufficient {GPU}" if gpus(pod) and used + gpus(pod) > node.gpus else None


def _tolerates(toleration: dict[str, str], taint: dict[str, str]) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return (toleration.get("key"), toleration.get("value")) == (taint["key"], taint.get("value"))
