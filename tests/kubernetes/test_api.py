"""The cluster of these tests is as strict as a real one: what a real API server refuses, it refuses too."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from tests.kubernetes.cluster import Cluster
from tests.kubernetes.deployment import RULES
from tests.kubernetes.image import Image
from tests.kubernetes.nodes import GPU_TAINT, Node

NAMESPACE = "lora"
POD_SECURITY = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def job(name: str = "job", container: dict[str, Any] | None = None, **pod: Any) -> dict[str, Any]:
    containers = [{"name": "c", "image": "image", "args": ["dagster", "--version"], "securityContext": SECURITY}]
    containers[0] |= container or {}
    spec = {"restartPolicy": "Never", "securityContext": POD_SECURITY, "containers": containers, **pod}
    template = {"metadata": {"labels": {"app": name}}, "spec": spec}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": template},
    }


class World:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        api = config.new_client_from_config(str(cluster.kubelet.kubeconfigs["runs"]))
        self.jobs, self.pods = client.BatchV1Api(api), client.CoreV1Api(api)

    def create(self, body: dict[str, Any]) -> None:
        self.jobs.create_namespaced_job(NAMESPACE, body)

    def pod(self, name: str = "job") -> Any:
        pods = self.pods.list_namespaced_pod(NAMESPACE, label_selector=f"job-name={name}").items
        return pods[0] if pods else None

    def until(self, condition: Any) -> Any:
        end = time.monotonic() + 180
        while not (found := condition()):
            assert time.monotonic() < end
            time.sleep(0.05)
        return found

    def condition(self, name: str = "job") -> str:
        return str(
            self.until(lambda: self.jobs.read_namespaced_job_status(name, NAMESPACE).status.conditions)[0].reason
        )

    def why_pending(self, name: str = "job") -> str:
        def why() -> str | None:
            pod = self.pod(name)
            return pod and pod.status.conditions and pod.status.conditions[0].message

        return str(self.until(why))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    gpu = Node("gpu-0", gpus=1, labels={"pool": "gpu"}, taints=[GPU_TAINT])
    cluster = Cluster(tmp_path / "cluster", [Node("cpu-0"), gpu], {"runs": RULES}, NAMESPACE)
    with cluster:
        image = cluster.kubelet.images["image"] = Image([], dict(cluster.environment))
        assert image.ready.wait(180)
        yield World(cluster)


@pytest.mark.parametrize(
    ("where", "what", "code"),
    [
        ("image", "", 422),
        ("volume_mounts", [], 400),
        ("volumeMounts", [{"name": "nowhere", "mountPath": "/data"}], 422),
        ("resources", {"limits": {"nvidia.com/gpu": "0.5"}}, 422),
        ("resources", {"requests": {"nvidia.com/gpu": "1"}}, 422),
        ("resources", {"limits": {"memory": "1Gi"}, "requests": {"memory": "2Gi"}}, 422),
        ("resources", {"limits": {"memory": "1 GB"}}, 422),
        ("securityContext", {}, 403),
        ("securityContext", SECURITY | {"runAsNonRoot": False}, 403),
    ],
)
def test_a_container_that_a_real_server_refuses_is_refused(world: World, where: str, what: Any, code: int) -> None:
    with pytest.raises(client.ApiException) as refused:
        world.create(job(container={where: what}))
    assert refused.value.status == code


def test_a_pod_that_a_real_server_refuses_is_refused(world: World) -> None:
    wrong = [
        job(restartPolicy="Always"),
        job(tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]),
        job(tolerations=[{"key": "a", "operator": "Is"}]),
        job("Job_With_Underscores"),
    ]
    wrong.append(copy.deepcopy(job()))
    wrong[-1]["metadata"]["labels"] = {"dagster/op": "not a label"}
    for body in wrong:
        with pytest.raises(client.ApiException) as refused:
            world.create(body)
        assert refused.value.status == 422, body
    world.create(job())
    with pytest.raises(client.ApiException, match="AlreadyExists"):
        world.create(job())


def test_what_the_role_does_not_allow_is_forbidden(world: World) -> None:
    with pytest.raises(client.ApiException) as forbidden:
        world.pods.delete_namespaced_event("e", NAMESPACE)
    assert forbidden.value.status == 403
    nobody = client.ApiClient(client.Configuration(host=world.cluster.server.url))
    with pytest.raises(client.ApiException) as unknown:
        client.BatchV1Api(nobody).list_namespaced_job(NAMESPACE)
    assert unknown.value.status == 401


def test_a_job_succeeds_and_its_pods_log_can_be_read(world: World) -> None:
    world.create(job())
    assert world.condition() == "CompletionsReached"
    assert "version" in world.pods.read_namespaced_pod_log(world.pod().metadata.name, NAMESPACE)


def test_a_job_fails_by_its_back_off_limit_and_by_its_deadline(world: World) -> None:
    world.create(job(container={"args": ["dagster", "no-such-command"]}))
    assert world.condition() == "BackoffLimitExceeded"
    late = job("late", nodeSelector={"pool": "none"})
    late["spec"]["activeDeadlineSeconds"] = 0.1
    with pytest.raises(client.ApiException):
        world.create(late)
    late["spec"]["activeDeadlineSeconds"] = 1
    world.create(late)
    assert world.condition("late") == "DeadlineExceeded"


def test_a_pod_runs_only_where_selector_taints_and_gpus_allow(world: World) -> None:
    asks = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    tolerates = {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]}
    world.create(job("untolerated", asks))
    assert "untolerated taint" in world.why_pending("untolerated")
    world.create(job("elsewhere", nodeSelector={"pool": "none"}))
    assert "node affinity/selector" in world.why_pending("elsewhere")
    world.create(job("greedy", {"resources": {"limits": {"nvidia.com/gpu": "2"}}}, **tolerates))
    assert "Insufficient nvidia.com/gpu" in world.why_pending("greedy")
    world.create(job("fits", asks, nodeSelector={"pool": "gpu"}, **tolerates))
    assert world.condition("fits") == "CompletionsReached"
    assert world.pod("fits").spec.node_name == "gpu-0"


def test_a_pod_waits_for_its_image_its_claim_and_its_secret(world: World) -> None:
    def waits(name: str) -> str | None:
        pod = world.pod(name)
        statuses = pod and pod.status.container_statuses
        return statuses[0].state.waiting.reason if statuses and statuses[0].state.waiting else None

    world.create(job("no-image", {"image": "other"}))
    assert world.until(lambda: waits("no-image")) == "ImagePullBackOff"
    world.create(job("no-secret", {"envFrom": [{"secretRef": {"name": "nowhere"}}]}))
    assert world.until(lambda: waits("no-secret")) == "CreateContainerConfigError"
    world.create(job("no-claim", volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "nowhere"}}]))
    assert 'persistentvolumeclaim "nowhere" not found' in world.why_pending("no-claim")
    events = world.pods.list_namespaced_event(
        NAMESPACE, field_selector=f"involvedObject.name={world.pod('no-image').metadata.name}"
    )
    assert [event.reason for event in events.items] == ["Failed"]


def test_a_deleted_job_leaves_its_pod_unless_told_otherwise(world: World) -> None:
    for name, policy in (("orphan", None), ("cascade", "Background")):
        world.create(job(name, nodeSelector={"pool": "none"}))
        world.why_pending(name)
        world.jobs.delete_namespaced_job(name, NAMESPACE, **({"propagation_policy": policy} if policy else {}))
        assert world.jobs.list_namespaced_job(NAMESPACE).items == []
        assert bool(world.pod(name)) == (policy is None)


def test_what_a_pod_owns_ends_with_it_and_what_is_over_after_its_time(world: World) -> None:
    world.create(job("owner", nodeSelector={"pool": "none"}))
    world.why_pending("owner")
    pod = world.pod("owner")
    owned = job("owned", nodeSelector={"pool": "none"})
    reference = {"apiVersion": "v1", "kind": "Pod", "name": pod.metadata.name, "uid": pod.metadata.uid}
    owned["metadata"]["ownerReferences"] = [reference]
    world.create(owned)
    short = job("short")
    short["spec"]["ttlSecondsAfterFinished"] = 0
    world.create(short)
    world.pods.delete_namespaced_pod(pod.metadata.name, NAMESPACE)
    world.until(lambda: {each.metadata.name for each in world.jobs.list_namespaced_job(NAMESPACE).items} == {"owner"})
