"""What a step asks of Kubernetes; on one machine nobody reads it."""

from collections.abc import Mapping
from typing import Any

# A tag of the step itself: a job's tags would reach the run's own pod alone, and miss the runs that the UI starts.
_CONFIG = "dagster-k8s/config"


def gpu_step(gpus: int = 1) -> Mapping[str, Any]:
    """Tags of a step that computes on NVIDIA GPUs."""
    return {_CONFIG: {"container_config": {"resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}}}
