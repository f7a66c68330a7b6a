"""What a person fixes of a plan; the rest is chosen."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from finetune.planning.models import Attention, Optimizer


class PlanOverrides(BaseModel):
    """Values of `TrialConfig` that are given; ``None`` leaves the choice to the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lora_rank: int | None = Field(None, ge=1)
    lora_alpha: float | None = Field(None, gt=0)
    lora_dropout: float | None = Field(None, ge=0, lt=1)
    use_rslora: bool | None = None
    use_dora: bool | None = None
    use_pissa: bool | None = None
    virtual_tokens: int | None = Field(None, ge=1)
    target_modules: list[str] | Literal["all-linear"] | None = None
    learning_rate: float | None = Field(None, gt=0)
    lr_schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] | None = None
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)
    optimizer: Optimizer | None = None
    micro_batch: int | None = Field(None, ge=1)
    accumulation: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    max_steps: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=8)
    packing: bool | None = None
    precision: Literal["bf16", "fp32"] | None = None
    gradient_checkpointing: bool | None = None
    attention: Attention | None = None
    seed: int | None = Field(None, ge=0)

    @field_validator("attention", mode="before")
    @classmethod
    def _short_name(cls, value: object) -> object:
        return "flash_attention_2" if value == "flash" else value
