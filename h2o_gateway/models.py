"""What goes over the wire."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from finetune.planning.models import TrialConfig

Status = Literal["queued", "running", "finished", "failed", "stopped"]
ENDED: tuple[Status, ...] = ("finished", "failed", "stopped")


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class Dataset(BaseModel):
    """A dataset that is kept, under its content's hash."""

    id: str = Field(description="To be named in an experiment.")
    sha256: str = Field(description="Of the file as uploaded, in hexadecimal.")
    name: str
    bytes: int
    records: int


class LoraConfig(TrialConfig):
    """The LoRA configuration of a plan; a field that is not known is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trial_id: str = ""


class ExperimentRequest(BaseModel):
    """What shall be trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    dataset_id: str
    base_model: str = Field(max_length=200, description="A name of H2O_GATEWAY_MODELS, or one on the hub.")
    base_model_revision: str | None = Field(None, max_length=200, description="Branch, tag or commit on the hub.")
    base_model_fingerprint: str | None = Field(
        None, max_length=200, description="The client's fingerprint of the base model; another one here is an error."
    )
    config: LoraConfig = Field(default_factory=LoraConfig)
    # H2O LLM Studio makes file names of it.
    name: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9_ .:-]{0,99})?$")
    idempotency_key: str | None = Field(
        None, min_length=1, max_length=200, description="The same key gives the same experiment."
    )


class Experiment(BaseModel):
    """An experiment as it stands."""

    id: str
    idempotency_key: str | None
    name: str
    status: Status
    queue_position: int | None = Field(description="From 1, while it is queued.")
    gpu: str | None
    attempt: int = Field(description="Above 1 where a restarted machine has interrupted earlier ones.")
    step: int = Field(description="Optimizer steps done.")
    total_steps: int | None
    metrics: dict[str, float] = Field(description="loss, learning_rate, gpu_hours, as far as they are known.")
    error: str
    log_tail: str = Field(description="The last lines of its log; empty in a listing.")
    dataset_id: str
    base_model: str
    sha256: str | None = Field(description="Of the archive, once it is finished.")
    bytes: int | None = Field(description="Size of the archive, once it is finished.")
    url: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class Experiments(BaseModel):
    """A page of experiments, the newest first."""

    experiments: list[Experiment]
    total: int


class Health(BaseModel):
    """Whether the gateway works."""

    status: Literal["ok", "failing"]
    queued: int
    running: int
    gpus: int
