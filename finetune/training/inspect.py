"""Looking at a published adapter."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import ArtifactError


def non_finite_tensors(adapter_dir: Path) -> list[str]:
    """Names of the adapter's tensors that hold NaN or infinity.

    Raises:
        ArtifactError: the weights cannot be read.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    path = adapter_dir / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as weights:
            return [name for name in weights.keys() if not torch.isfinite(weights.get_tensor(name)).all()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"the adapter's weights cannot be read: {error}", where=path, remedy="Materialize the adapter again"
        ) from error
