"""A training in the run log, as it is read."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from resources.trainer import BACKEND_LABELS

Status = Literal["RUNNING", "COMPLETED", "FAILED"]


class TrainingRun(BaseModel):
    """One row of the run log; what lies beside the table is empty for rows that others wrote."""

    model_config = ConfigDict(frozen=True)

    id: int
    dataset_paths: list[str]
    base_model: str
    adapter_path: str | None
    backend: str
    external_run_id: str | None
    metrics: dict[str, Any]
    status: str
    error_message: str | None
    started_at: datetime
    finished_at: datetime | None
    created_at: datetime
    training_run_id: str | None = None
    dataset_date: str | None = None
    dagster_run_id: str | None = None
    attempts: int | None = None
    host: str | None = None
    external_run_url: str | None = None

    @property
    def backend_label(self) -> str:
        """What a person reads, such as ``Remote Training (H2O)``."""
        return BACKEND_LABELS.get(self.backend, self.backend)

    @property
    def seconds(self) -> float | None:
        """How long the run took, if it has ended."""
        return None if self.finished_at is None else (self.finished_at - self.started_at).total_seconds()
