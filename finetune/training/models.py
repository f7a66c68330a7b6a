"""What a training run hands to the steps after it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from finetune.base_model.models import BaseModelRef
from finetune.dataset.models import PreparedDataset
from finetune.planning.models import TrainingPlan
from finetune.training.reporting import Tracker

Sharding = Literal["ddp", "fsdp"]


class LossPoint(BaseModel):
    """One line of the training log."""

    model_config = ConfigDict(frozen=True)

    step: int
    loss: float
    learning_rate: float


class TrainingResult(BaseModel):
    """A published adapter in PEFT's layout, or what a dry run found."""

    model_config = ConfigDict(frozen=True)

    status: Literal["completed", "dry_run", "failed"]
    run_id: str
    backend: Literal["hf-peft", "h2o"]
    adapter_path: Path | None
    adapter_hash: str | None
    training_steps: int
    gpu_hours: float
    final_loss: float | None
    loss_curve: list[LossPoint] = []
    tokens_seen: int | None = None
    tokens_per_second: float | None = None
    peak_memory_gb: float | None = None
    # "cpu" or the GPU's name
    device: str | None = None
    seconds: float = 0.0
    # how many trained together, on all machines
    processes: int = 1
    external_run_id: str | None = None
    external_run_url: str | None = None
    # the step that the last attempt went on from, 0 when it started afresh
    resumed_from_step: int = 0
    # records of one pass, smaller than planned where memory ran out
    micro_batch: int | None = None
    # the micro-batches with which memory ran out, in turn
    out_of_memory: list[int] = []
    trainable_params: int | None = None
    reused: bool = False
    # of a dry run
    plan: TrainingPlan | None = None


class Nodes(BaseModel):
    """The machines of one training, all of which see the same files; named as torchrun's options are."""

    model_config = ConfigDict(frozen=True)

    count: int = Field(ge=2)
    # this machine's number; 0 is the one whose address the others are given
    rank: int = Field(ge=0)
    master_addr: str
    master_port: int = 29500


class InitAdapter(BaseModel):
    """An adapter in PEFT's layout whose weights a training begins with, in the place of fresh ones."""

    model_config = ConfigDict(frozen=True)

    path: Path
    # the training that made it
    run_id: str
    adapter_hash: str


class TrainingRequest(BaseModel):
    """Everything a trainer needs, local or remote."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    date: str
    dataset: PreparedDataset
    plan: TrainingPlan
    base_model: BaseModelRef
    # where the adapter is published, and where checkpoints live meanwhile
    adapter_dir: Path
    work_dir: Path
    # None begins with fresh weights; the optimizer is fresh either way
    init_adapter: InitAdapter | None = None
    # seconds between checkpoints; 0 takes one after every optimizer step
    checkpoint_seconds: float = 120.0
    # a checkpoint of the same training to go on from, unless the work directory holds a newer one
    resume_from: Path | None = None
    # where figures are reported beside TensorBoard
    report_to: Tracker = "none"
    # how many processes train on each node; None is one a GPU, or one where there is none
    processes: int | None = None
    # what several processes share: ddp the work alone, fsdp the base model's weights too
    sharding: Sharding = "ddp"
    # None is this machine alone
    nodes: Nodes | None = None
