"""Settings of steps on Kubernetes."""

from __future__ import annotations

from pydantic import Field

from lora_assets.settings.values import SettingsGroup, pairs


class KubernetesSettings(SettingsGroup):
    """What steps ask of a cluster."""

    train_image: str | None = Field(
        None, description="On Kubernetes: image of the steps that need torch or llama.cpp; unset: the code location's."
    )
    step_cpu: str = Field("1", description="On Kubernetes: CPUs of a step that computes little.")
    step_memory: str = Field("2Gi", description="On Kubernetes: memory of a step that computes little.")
    convert_cpu: str = Field("2", description="On Kubernetes: CPUs of the steps that merge and convert.")
    convert_memory: str = Field("16Gi", description="On Kubernetes: memory of the steps that merge and convert.")
    gpu_cpu: str = Field("4", description="On Kubernetes: CPUs of a GPU step.")
    gpu_memory: str = Field("32Gi", description="On Kubernetes: memory of a GPU step, /dev/shm included.")
    shm_size: str = Field("8Gi", description="On Kubernetes: size of a GPU step's /dev/shm.")
    gpu_node_selector: str = Field(
        "nvidia.com/gpu.present=true",
        pattern=r"^(any|[^=,\s]+=[^=,\s]+(,[^=,\s]+=[^=,\s]+)*)$",
        description="On Kubernetes: label=value, comma-separated, of the nodes for GPU steps; any: whichever has GPUs.",
    )
    gpu_tolerations: str = Field(
        "nvidia.com/gpu", description="On Kubernetes: comma-separated keys of the taints that GPU steps tolerate."
    )
    pod_start_seconds: int = Field(
        900, ge=10, description="On Kubernetes: a step whose pod has not started after this time fails, and is retried."
    )

    @property
    def gpu_nodes(self) -> dict[str, str]:
        """The labels of the nodes for GPU steps."""
        return {} if self.gpu_node_selector == "any" else dict(pairs(self.gpu_node_selector))

    @property
    def tolerated(self) -> list[str]:
        """The keys of the taints that GPU steps tolerate."""
        return [key.strip() for key in self.gpu_tolerations.split(",") if key.strip()]
