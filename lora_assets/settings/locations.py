"""Settings of where things are."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from pydantic import Field

from finetune.layout import DataLayout
from lora_assets.settings.values import AbsolutePath, SettingsGroup, on_kubernetes


def _default_data_root() -> Path:
    return Path("/data") if on_kubernetes() else Path("data")


class LocationSettings(SettingsGroup):
    """Where exports come from, and where everything lands."""

    data_root: AbsolutePath = Field(
        default_factory=_default_data_root, description="Where everything lands: /data in a pod, ./data elsewhere."
    )
    pipeline_name: str = Field(
        "brain", pattern=r"^[a-z][a-z0-9_]{0,39}$", description="The loop's name, part of paths and asset keys."
    )
    exports_dir: AbsolutePath | None = Field(
        None, description="What is watched; unset: DATA_ROOT/datasets/PIPELINE_NAME."
    )
    exports_pattern: str | None = Field(None, description="File names; unset: PIPELINE_NAME_dataset_*.jsonl.")

    @cached_property
    def layout(self) -> DataLayout:
        """Where everything lies under the data root."""
        return DataLayout(self.data_root, self.pipeline_name)

    @property
    def exports(self) -> Path:
        """The watched directory."""
        return self.exports_dir or self.layout.exports

    @property
    def pattern(self) -> str:
        """The watched file names."""
        return self.exports_pattern or f"{self.pipeline_name}_dataset_*.jsonl"
