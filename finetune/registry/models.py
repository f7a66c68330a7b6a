"""What the registry keeps of an adapter, and of who reigned when."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

# collected: its weights were removed by `gc`; retired: it reigned once.
Status = Literal["champion", "challenger", "retired", "collected"]


class RegisteredVersion(BaseModel):
    """One immutable version; `stored_path` is an adapter in PEFT's layout, `reason` why its status is what it is."""

    model_config = ConfigDict(frozen=True)

    version: str
    adapter_hash: str
    stored_path: Path
    created_at: datetime
    run_id: str
    trial_id: str
    metrics: dict[str, float]
    tags: dict[str, str]
    lineage: dict[str, Any]
    status: Status
    reason: str

    @property
    def number(self) -> int:
        """3 for ``v3``."""
        return int(self.version.removeprefix("v"))

    @property
    def base_fingerprint(self) -> str | None:
        """Fingerprint of the base model that the adapter was trained on, from the lineage."""
        return self.lineage.get("base_model_fingerprint")


class Event(BaseModel):
    """One entry of the history: a version became champion, was rolled back to, or stayed challenger."""

    model_config = ConfigDict(frozen=True)

    number: int
    at: datetime
    action: Literal["promote", "rollback", "refuse"]
    version: str
    # who reigned before, for promote and rollback
    replaced: str | None
    reason: str
    by: str


class Decision(BaseModel):
    """Whether a candidate becomes champion, and why, in a sentence with numbers.

    `against` is the version that reigned when it was taken, None if there was none.
    """

    model_config = ConfigDict(frozen=True)

    champion: bool
    reason: str
    against: str | None
