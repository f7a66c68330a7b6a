"""The Job controller and the garbage collector: pods for Jobs, and no object without its owner."""

from __future__ import annotations

import copy
import time
import uuid
from typing import Any

from tests.kubernetes.kubelet import Kubelet
from tests.kubernetes.objects import Object, Objects, is_over, now, owned_by


class JobController:
    """Keeps each Job's pod running until it has succeeded, or failed more often than `backoffLimit` allows."""

    def __init__(self, objects: Objects, kubelet: Kubelet) -> None:
        self._objects, self._kubelet = objects, kubelet
        # By a Job's uid: its pods that were seen, and how each ended; when it began, and when it was over.
        self._seen: dict[str, dict[str, str | None]] = {}
        self._began: dict[str, float] = {}
        self._over: dict[str, float] = {}

    def tick(self) -> None:
        for job in self._objects.all("jobs"):
            self._reconcile(job)
        self._collect_garbage()

    def _reconcile(self, job: Object) -> None:
        uid, spec, status = job["metadata"]["uid"], job["spec"], job["status"]
        if uid in self._over:
            lifetime = spec.get("ttlSecondsAfterFinished")
            if lifetime is not None and time.monotonic() - self._over[uid] > lifetime:
                self._remove(job)
            return
        began = self._began.setdefault(uid, time.monotonic())
        pods = {pod["metadata"]["uid"]: pod for pod in self._objects.all("pods") if owned_by(pod, job)}
        seen = self._look_at(uid, pods)
        active = [pod for pod_uid, pod in pods.items() if not seen.get(pod_uid)]
        counts = {phase: list(seen.values()).count(phase) for phase in ("Succeeded", "Failed")}
        _count(status, active=len(active), succeeded=counts["Succeeded"], failed=counts["Failed"])
        deadline = spec.get("activeDeadlineSeconds")
        if counts["Succeeded"]:
            self._end(job, "Complete", "CompletionsReached", "Reached expected number of succeeded pods")
        elif counts["Failed"] > spec.get("backoffLimit", 6):
            self._end(job, "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
        elif deadline is not None and time.monotonic() - began > deadline:
            for pod in active:
                self._kubelet.delete(pod)
            _count(status, active=0, succeeded=0, failed=counts["Failed"] + len(active))
            self._end(job, "Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
        elif not active:
            pod = self._start_pod(job)
            seen[pod["metadata"]["uid"]] = None
            _count(status, active=1, succeeded=0, failed=counts["Failed"])

    def _look_at(self, uid: str, pods: dict[str, Object]) -> dict[str, str | None]:
        """How each pod that a Job ever had has ended, None while it is at work."""
        seen = self._seen.setdefault(uid, {})
        for pod_uid in set(seen) | set(pods):
            pod = pods.get(pod_uid)
            if pod is not None and is_over(pod):
                seen[pod_uid] = pod["status"]["phase"]
            elif pod is None or "deletionTimestamp" in pod["metadata"]:
                # A pod that is being deleted counts as failed before it is gone.
                seen[pod_uid] = seen.get(pod_uid) or "Failed"
        return seen

    def _start_pod(self, job: Object) -> Object:
        template = copy.deepcopy(job["spec"]["template"])
        metadata = template.setdefault("metadata", {})
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        metadata["name"] = f"{name}-{uuid.uuid4().hex[:5]}"
        metadata["labels"] = (metadata.get("labels") or {}) | {
            "job-name": name,
            "batch.kubernetes.io/job-name": name,
            "batch.kubernetes.io/controller-uid": uid,
        }
        metadata["ownerReferences"] = [{"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}]
        return self._objects.add("pods", job["metadata"]["namespace"], template, phase="Pending")

    def _end(self, job: Object, kind: str, reason: str, message: str) -> None:
        self._over[job["metadata"]["uid"]] = time.monotonic()
        condition = {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now()}
        job["status"]["conditions"] = [condition]
        if kind == "Complete":
            job["status"]["completionTime"] = now()
        else:
            self._objects.event(job, reason, message)

    def _remove(self, job: Object) -> None:
        for pod in self._objects.all("pods"):
            if owned_by(pod, job):
                self._kubelet.delete(pod)
        self._objects.remove("jobs", job["metadata"]["namespace"], job["metadata"]["name"])

    def _collect_garbage(self) -> None:
        """Delete the Jobs whose owner is a pod that is no more."""
        alive = {pod["metadata"]["uid"] for pod in self._objects.all("pods")}
        for job in self._objects.all("jobs"):
            references = job["metadata"].get("ownerReferences") or []
            if references and not any(reference["uid"] in alive for reference in references):
                self._remove(job)


def _count(status: dict[str, Any], **counts: int) -> None:
    """The API leaves out counts of nothing."""
    for name, count in counts.items():
        status.pop(name, None)
        if count:
            status[name] = count
