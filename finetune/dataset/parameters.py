"""What decides about records, besides the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from finetune.dataset.deletions import Deletions, read_deletions
from finetune.dataset.near import NearMode
from finetune.dataset.near import rules as near_rules
from finetune.dataset.scan import DEFAULT_LIMITS
from finetune.dataset.screening import Screening, SensitiveMode
from finetune.dataset.sensitive import rules as sensitive_rules

# Parameters that every dataset depends on; all others are options, which are off by default.
PLAIN = {"window", "eval_fraction", "salt", "max_line_bytes", "max_depth"}


class PrepareParameters(BaseModel):
    """Window, split, limits, and what must not be learned; by default nothing is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: str = Field(
        default="all",
        pattern=r"^(all|date|last:[1-9]\d*)$",
        description="Which dates to train on: all up to the dataset's date, that date alone, or last:N dates with data",
    )
    eval_fraction: float = Field(default=0.1, gt=0, lt=1, description="Share of prompts held out for evaluation")
    salt: str = Field(default="", description="Another salt gives another split")
    max_line_bytes: int = Field(
        default=DEFAULT_LIMITS.max_line_bytes,
        ge=2,
        lt=1 << 31,
        description="Longer lines are rejected; bytes without the line feed",
    )
    max_depth: int = Field(
        default=DEFAULT_LIMITS.max_depth,
        ge=2,
        le=256,
        description="Lines that nest objects and arrays deeper are rejected",
    )
    deletion_list: Path | None = Field(default=None, description="Ids and content hashes of what must not be learned")
    id_field: str = Field(default="id", min_length=1, description="Field of a record's id, or its path")
    min_quality: float | None = Field(
        default=None, allow_inf_nan=False, description="Records of less quality, or of none, are left out"
    )
    quality_field: str = Field(default="quality", min_length=1, description="Field of a record's quality, or its path")
    sensitive_data: SensitiveMode = Field(
        default="off", description="Look for secrets and personal data: report, mask or reject them"
    )
    near_duplicates: NearMode = Field(default="off", description="Look for near-duplicates: report or drop them")
    near_threshold: float = Field(
        default=0.8, ge=0.7, le=1, description="Least Jaccard similarity of near-duplicates' three-word shingles"
    )

    def deletions(self) -> Deletions:
        """The deletion list; empty without one.

        Raises:
            ConfigurationError: the list cannot be read.
        """
        return read_deletions(self.deletion_list) if self.deletion_list else Deletions()

    def screening(self, deletions: Deletions) -> Screening | None:
        """What to look for in records, if anything."""
        screening = Screening(
            id_field=self.id_field if deletions.ids else None,
            quality_field=None if self.min_quality is None else self.quality_field,
            sensitive=self.sensitive_data,
            near=self.near_duplicates != "off",
            rules=self._rules(),
        )
        return screening if deletions or screening != Screening() else None

    def deciding(self, deletions: Deletions) -> dict[str, Any]:
        """What a dataset depends on, as JSON values: the deletion list by its entries, no option that is off."""
        chosen = self.model_dump(include=PLAIN)
        if deletions:
            chosen["deletions"] = {"fingerprint": deletions.fingerprint, "entries": len(deletions)}
            chosen["id_field"] = self.id_field
        if self.min_quality is not None:
            chosen |= {"min_quality": self.min_quality, "quality_field": self.quality_field}
        if self.sensitive_data != "off":
            chosen["sensitive_data"] = self.sensitive_data
        if self.near_duplicates != "off":
            chosen |= {"near_duplicates": self.near_duplicates, "near_threshold": self.near_threshold}
        return chosen | ({"rules": list(rules)} if (rules := self._rules()) else {})

    def _rules(self) -> tuple[str, ...]:
        sensitive = (sensitive_rules(),) if self.sensitive_data != "off" else ()
        return (*sensitive, near_rules()) if self.near_duplicates != "off" else sensitive
