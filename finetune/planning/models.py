"""The plan of one training: configuration, search space, memory estimate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from finetune.dataset.models import PreparedDataset

# full is estimated, for comparison, and never trained
Method = Literal["full", "lora", "qlora", "prefix", "ia3"]
TrainableMethod = Literal["lora", "qlora", "prefix", "ia3"]
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd", "adafactor"
]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Task = Literal["instruction", "domain", "chat", "style"]


class TrialConfig(BaseModel):
    """Everything that decides what a training does; equal configurations give equal adapters on CPU."""

    # A misspelt name in a plan that somebody changed by hand would leave the default in its place.
    model_config = ConfigDict(frozen=True, extra="forbid")

    trial_id: str
    method: Method = "lora"
    task: Task = "instruction"
    lora_rank: int = Field(8, ge=1)
    # a float, as JSON gives it back: trainings are named by it
    lora_alpha: float = 16.0
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    use_pissa: bool = False
    # length of the learned prefix, for the method prefix alone
    virtual_tokens: int = Field(20, ge=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    learning_rate: float = Field(2e-4, gt=0)
    lr_schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = 0.0
    optimizer: Optimizer = "adamw_torch_fused"
    micro_batch: int = Field(4, ge=1)
    accumulation: int = Field(4, ge=1)
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    max_length: int = Field(1024, ge=8)
    packing: bool = False
    precision: Literal["bf16", "fp32"] = "fp32"
    gradient_checkpointing: bool = False
    attention: Attention = "sdpa"
    seed: int = Field(42, ge=0)

    @property
    def effective_batch(self) -> int:
        """Records per optimizer step."""
        return self.micro_batch * self.accumulation

    def records_seen(self, count: int) -> int:
        """How many records a training on `count` of them sees, each as often as it is trained."""
        if self.max_steps is not None:
            return self.max_steps * self.effective_batch
        return max(1, round(count * self.epochs))

    def steps(self, count: int) -> int:
        """Optimizer steps of a training on `count` records; the last one may be smaller than the others."""
        return math.ceil(self.records_seen(count) / self.effective_batch)


class Range(BaseModel):
    """One dimension of the search space: an interval, or a list of choices."""

    model_config = ConfigDict(frozen=True)

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: list[int | float | str | bool] | None = None

    def __str__(self) -> str:
        if self.choices is not None:
            return ", ".join(map(str, self.choices))
        return f"{self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"


class MemoryEstimate(BaseModel):
    """Peak memory of the training in GB (10^9 bytes) and its parts.

    Where earlier trainings took more or less than estimated, `vram_gb` is the arithmetic's figure times
    `correction`, and the part ``correction`` is the difference.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    vram_gb: float
    fits: bool | None
    limit_gb: float | None
    model_params: int
    trainable_params: int
    parts: dict[str, float]
    correction: float = 1.0


class CostEstimate(BaseModel):
    """Time and price of the training; `throughput` tells where the tokens per second come from."""

    model_config = ConfigDict(frozen=True)

    tokens_per_second: float | None
    throughput: str
    gpu_hours: float | None
    # in the currency of the price that was given
    price: float | None


class Continued(BaseModel):
    """A registered version that a training goes on with, and the records that it goes on with."""

    model_config = ConfigDict(frozen=True)

    version: str
    run_id: str
    adapter_hash: str
    adapter_path: Path
    # what is trained on, in the place of the whole dataset
    dataset: PreparedDataset
    new_records: int
    replayed_records: int


class Start(BaseModel):
    """Where a training was decided to begin, which stays so for as long as the same is asked.

    `asked` is a hash of the question: dataset, base model, settings. `version` is None for the base model.
    """

    model_config = ConfigDict(frozen=True)

    asked: str
    version: str | None
    reason: str


class TrainingPlan(BaseModel):
    """What the training step is handed, with one line of explanation per choice."""

    model_config = ConfigDict(frozen=True)

    trial_config: TrialConfig
    search_space: dict[str, Range]
    memory_estimate: MemoryEstimate
    explanations: list[str]
    estimated_steps: int
    estimated_tokens: int | None
    cost: CostEstimate | None = None
    # None begins with the base model alone
    continued: Continued | None = None
    # of a plan for which a version to start from was looked for
    start: Start | None = None
