"""Settings of the plan and of the training."""

from __future__ import annotations

import shutil
from typing import Literal

from pydantic import Field

from finetune.planning.models import Task, TrainableMethod
from finetune.training.models import Sharding
from finetune.training.reporting import Tracker
from lora_assets.settings.values import SettingsGroup, on_kubernetes


class TrainingSettings(SettingsGroup):
    """How adapters are trained."""

    training_method: TrainableMethod | None = Field(
        None, description="lora, qlora (4-bit base), prefix or ia3; unset: lora, or qlora where lora does not fit."
    )
    training_task: Task = Field("instruction", description="What the adapter is for; the plan's defaults follow it.")
    lora_rank: int | None = Field(None, ge=1, description="Rank of the adapter; unset: the plan chooses.")
    train_epochs: float | None = Field(None, gt=0, description="Passes over the data; unset: the plan chooses.")
    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate; unset: the plan chooses.")
    max_length: int | None = Field(None, ge=8, description="Tokens per record; unset: the plan chooses.")
    micro_batch: int | None = Field(None, ge=1, description="Records per forward pass; unset: the plan chooses.")
    accumulation: int | None = Field(None, ge=1, description="Forward passes per step; unset: the plan chooses.")
    train_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="What the plan is made for; auto: cuda in a pod or where nvidia-smi is, else cpu."
    )
    vram_limit_gb: float | None = Field(None, gt=0, description="Memory of the card that the plan must fit.")
    tokens_per_second: float | None = Field(
        None, gt=0, description="Throughput to expect until a training of this model and method was measured."
    )
    gpu_hour_price: float | None = Field(None, ge=0, description="Price of one GPU-hour, in any currency.")
    max_gpu_hours: float | None = Field(
        None, gt=0, description="A training that is estimated to take longer does not start; unset: no limit."
    )
    seed: int = Field(42, description="Seed of everything random.")
    adopt_trial: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of an experiment's best configuration, which the plan then is; unset: the plan chooses.",
    )
    init_from: Literal["base", "champion"] = Field(
        "base",
        description="What a training begins with: base (the base model alone) or champion (the last champion of an "
        "earlier date, on what is new to it).",
    )
    replay_fraction: float = Field(
        0.25, ge=0, lt=1, description="With INIT_FROM=champion: share of a training's records that it knows already."
    )
    train_processes: int | None = Field(
        None, ge=1, description="Processes of a local training; unset: one a GPU, or one where there is none."
    )
    train_sharding: Sharding = Field(
        "ddp", description="What several processes share: ddp the records of a step, fsdp the model's weights too."
    )
    report_to: Tracker = Field(
        "none", description="Where a local training is tracked beside TensorBoard: none, mlflow or wandb."
    )
    checkpoint_seconds: float = Field(120, ge=0, description="Time between checkpoints of a local training.")

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What the plan is made for."""
        if self.train_device != "auto":
            return self.train_device
        return "cuda" if on_kubernetes() or shutil.which("nvidia-smi") else "cpu"
