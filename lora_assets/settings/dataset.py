"""Settings of the dataset."""

from __future__ import annotations

from pydantic import Field

from finetune.dataset.near import NearMode
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.screening import SensitiveMode
from lora_assets.settings.values import AbsolutePath, SettingsGroup


class DatasetSettings(SettingsGroup):
    """How exports become a dataset."""

    dataset_window: str = Field(
        "all",
        pattern=r"^(all|date|last:[1-9][0-9]*)$",
        description="What a date trains on: all (up to it), date (it alone), last:N (the last N dates with data).",
    )
    eval_fraction: float = Field(0.1, gt=0, lt=1, description="Share of prompts held out for evaluation.")
    max_line_bytes: int = Field(1 << 20, ge=1024, description="Longer lines are rejected.")
    max_reject_rate: float = Field(0.05, ge=0, le=1, description="Share of rejected lines that blocks training.")
    prepare_workers: int = Field(1, ge=1, description="Processes that validate exports.")
    deletion_list: AbsolutePath | None = Field(
        None, description="File of record ids and content hashes that must not be learned; unset: none."
    )
    id_field: str = Field("id", min_length=1, description="Field of a record's id, or its path such as meta.id.")
    min_quality: float | None = Field(
        None, description="Records of less quality, or of none, are left out; unset: all stay."
    )
    quality_field: str = Field(
        "quality", min_length=1, description="Field of a record's quality, or its path such as meta.quality."
    )
    sensitive_data: SensitiveMode = Field(
        "off", description="Look for secrets and personal data: off, report, mask or reject (the record)."
    )
    near_duplicates: NearMode = Field("off", description="Look for near-duplicates: off, report or drop.")
    near_threshold: float = Field(
        0.8, ge=0.7, le=1, description="Least similarity of near-duplicates: Jaccard, of three-word shingles."
    )

    @property
    def prepare_parameters(self) -> PrepareParameters:
        """How exports become a dataset."""
        return PrepareParameters(
            window=self.dataset_window,
            eval_fraction=self.eval_fraction,
            max_line_bytes=self.max_line_bytes,
            deletion_list=self.deletion_list,
            id_field=self.id_field,
            min_quality=self.min_quality,
            quality_field=self.quality_field,
            sensitive_data=self.sensitive_data,
            near_duplicates=self.near_duplicates,
            near_threshold=self.near_threshold,
        )
