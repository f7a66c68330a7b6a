"""What a step asks of Kubernetes; on one machine nobody reads it."""

from collections.abc import Mapping
from typing import Any

from lora_assets.settings import Settings

# A tag of the step itself: a job's tags would reach the run's own pod alone, and miss the runs that the UI starts.
_CONFIG = "dagster-k8s/config"


def any_step(settings: Settings) -> Mapping[str, Any]:
    """What every step gets that does not ask for more; for the executor, not as tags."""
    return {
        "container_config": {"resources": _exactly(cpu=settings.step_cpu, memory=settings.step_memory)},
        # Steps never call the cluster's API.
        "pod_spec_config": {"automount_service_account_token": False},
        # Another attempt is another Job, by Dagster's count. Kept for a day, for whoever asks what went wrong.
        "job_spec_config": {"backoff_limit": 0, "ttl_seconds_after_finished": 86400},
    }


def convert_step(settings: Settings) -> Mapping[str, Any]:
    """Tags of a step that holds a model in memory, or runs llama.cpp, without a GPU."""
    resources = _exactly(cpu=settings.convert_cpu, memory=settings.convert_memory)
    return {_CONFIG: {"container_config": {**_train_image(settings), "resources": resources}}}


def gpu_step(settings: Settings, gpus: int = 1) -> Mapping[str, Any]:
    """Tags of a step that computes on NVIDIA GPUs."""
    resources = _exactly(cpu=settings.gpu_cpu, memory=settings.gpu_memory, **{"nvidia.com/gpu": str(gpus)})
    return {
        _CONFIG: {
            "container_config": {
                **_train_image(settings),
                "resources": resources,
                # Processes that train together, and data loaders, exchange tensors there; a container has 64 MB.
                "volume_mounts": [{"name": "shm", "mount_path": "/dev/shm"}],  # noqa: S108 - a volume of the pod's own
            },
            "pod_spec_config": {
                "node_selector": settings.gpu_nodes,
                "tolerations": [{"key": key, "operator": "Exists"} for key in settings.tolerated],
                "volumes": [{"name": "shm", "empty_dir": {"medium": "Memory", "size_limit": settings.shm_size}}],
                # A training that is asked to end writes its checkpoint first.
                "termination_grace_period_seconds": 120,
            },
        }
    }


def _exactly(**amounts: str) -> dict[str, dict[str, str]]:
    """Limits and requests alike, so that no step is evicted for what another one takes."""
    return {"requests": amounts, "limits": amounts}


def _train_image(settings: Settings) -> dict[str, str]:
    return {"image": settings.train_image} if settings.train_image else {}
