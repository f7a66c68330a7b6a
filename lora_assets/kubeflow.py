"""A training on several machines of a cluster, as a TrainJob of Kubeflow Trainer (trainer.kubeflow.org/v1alpha1)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.errors import ConfigurationError

# The longest name that is made of it, of a pod, is "<name>-node-0-<number>-<five characters>".
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_DATA = "/data"


def train_job(
    *,
    name: str,
    image: str,
    command: Sequence[str],
    nodes: int,
    gpus: int,
    cpu: str,
    memory: str,
    claim: str,
    environment: Mapping[str, str],
    runtime: str = "torch-distributed",
) -> dict[str, Any]:
    """The manifest of a TrainJob whose pods all run one command, and find each other by the variables ``PET_*``.

    Fields are those of Kubeflow Trainer 2.3. The operator gives every pod its number and the first one's address;
    `lora-assets train` starts a process for each GPU.

    Args:
        name: of the TrainJob.
        image: with PyTorch and lora-assets.
        command: what each pod runs.
        nodes: pods, each on a machine of its own if it asks for all of its GPUs.
        gpus: of each pod; 0 trains on CPUs.
        cpu: cores of each pod, as Kubernetes writes quantities.
        memory: of each pod, likewise.
        claim: the ReadWriteMany PersistentVolumeClaim that every pod sees as ``/data``.
        environment: further variables of each pod.
        runtime: the ClusterTrainingRuntime.

    Raises:
        ConfigurationError: the name is none for Kubernetes.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} is no name for a TrainJob",
            where="--name",
            remedy="Use lower-case letters, digits and dashes, at most 40 and beginning with a letter",
        )
    amounts = {"cpu": cpu, "memory": memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    volumes = {"data": {"persistentVolumeClaim": {"claimName": claim}}, "shm": {"emptyDir": {"medium": "Memory"}}}
    mounts = {"data": _DATA, "shm": "/dev/shm"}  # noqa: S108 - a volume of the pod's own
    pod = {
        # A training that is asked to end writes its checkpoint first.
        "terminationGracePeriodSeconds": 120,
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "volumes": [{"name": volume, **source} for volume, source in volumes.items()],
        "containers": [
            {
                "name": "node",
                "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
            }
        ],
    }
    patch = {
        "template": {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]}}
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"name": runtime},
            "trainer": {
                "image": image,
                "command": list(command),
                "numNodes": nodes,
                "resourcesPerNode": {"requests": amounts, "limits": dict(amounts)},
                "env": [{"name": key, "value": value} for key, value in environment.items()],
            },
            "runtimePatches": [{"manager": "lora-assets.io/cli", "trainingRuntimeSpec": patch}],
        },
    }
