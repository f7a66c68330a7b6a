"""What several groups of settings are made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def _absolute(path: Path) -> Path:
    # Paths end in manifests and reach processes that run elsewhere.
    return path.expanduser().absolute()


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class SettingsGroup(BaseModel):
    """Settings of one purpose; ``Settings`` is all of them."""

    # No group is made alone: a validator for each would only cost time at every start.
    model_config = ConfigDict(defer_build=True)


def on_kubernetes() -> bool:
    """Whether this process runs in a pod (Kubernetes sets the variable in every container)."""
    return "KUBERNETES_SERVICE_HOST" in os.environ


def pairs(text: str) -> list[tuple[str, str]]:
    """``a=b,c=d`` as pairs."""
    parts = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    return [(name.strip(), value.strip()) for name, _, value in parts]
