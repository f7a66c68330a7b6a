"""An experiment as a person writes it down: what to train on and how, what to search, and what ends it."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from finetune.errors import ConfigurationError
from finetune.planning.models import Range, Task, TrainableMethod
from finetune.planning.overrides import PlanOverrides
from finetune.publishing import sha256_json
from finetune.search.ledger import Limits
from finetune.search.models import Strategy
from finetune.search.suggest import Sampler

Metric = Literal["eval_loss", "eval_perplexity", "delta_vs_base_loss"]
MergeFormat = Literal["safetensors", "gguf", "pytorch"]

# What is searched unless the experiment says otherwise: what matters most first (LoRA Without Regret; QLoRA).
_SEARCHED = ["learning_rate", "lora_rank", "lora_alpha", "lora_dropout", "virtual_tokens", "accumulation"]
Spec = TypeVar("Spec", bound="TrainingSpec")


class TrainingSpec(BaseModel):
    """What every experiment and protocol says of its trainings: on what, for what, and what they have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What may be changed when it is run again: it decides how far to go, not what is trained.
    may_change: ClassVar[frozenset[str]] = frozenset({"goal", "dry_run", "dataset_path", "dataset_date", "base_model"})

    goal: str = ""
    # a file of records, or a date of the loop's exports; in Dagster the partition is the date
    dataset_path: Path | None = None
    dataset_date: date | None = None
    base_model: str | None = None
    task: Task = "instruction"
    # values of the plan that every training has
    fixed: PlanOverrides = PlanOverrides()
    # throughput of one device until a training has measured it
    tokens_per_second: float | None = Field(None, gt=0)
    dry_run: bool = False

    @model_validator(mode="after")
    def _one_dataset(self) -> TrainingSpec:
        if self.dataset_path is not None and self.dataset_date is not None:
            raise ValueError("dataset_path and dataset_date exclude each other")
        return self

    def identity(self, *of: str) -> str:
        """A short stable name of everything that decides what is trained, and of what it is trained on.

        Args:
            of: fingerprints of the dataset and of the base model.
        """
        return sha256_json([self.model_dump(mode="json", exclude=set(self.may_change)), *of])[:12]


class ExperimentSpec(TrainingSpec, Limits):
    """All fields of an experiment; every metric is better when it is lower.

    Limits, workers and what is made of the result may change from run to run of one experiment. Where the throughput
    is unknown, the first trial runs alone.
    """

    may_change: ClassVar[frozenset[str]] = TrainingSpec.may_change | {
        *Limits.model_fields,
        "auto_merge",
        "merge_format",
        "workers",
    }

    methods: list[TrainableMethod] = Field(["lora"], min_length=1)
    parameters: list[str] = Field(_SEARCHED, min_length=1)
    # ranges that replace the plan's, or add to them
    search_space: dict[str, Range] = Field(default_factory=dict)
    strategy: Strategy = "bayesian"
    sampler: Sampler = "tpe"
    hyperband: bool = False
    seed: int = Field(42, ge=0)
    stop_metric: Metric = "eval_loss"
    workers: int = Field(1, ge=1, le=64)
    auto_merge: bool = False
    merge_format: MergeFormat = "safetensors"

    @field_validator("methods", "parameters")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("a name stands there twice")
        return names

    @model_validator(mode="after")
    def _fitting(self) -> ExperimentSpec:
        if self.sampler != "tpe" and self.strategy != "bayesian":
            raise ValueError("sampler is for strategy bayesian")
        if self.hyperband and self.strategy != "halving":
            raise ValueError("hyperband is for strategy halving")
        plain = {name.rpartition(".")[2] for name in self.search_space}
        # What is searched by default gives way to what is fixed.
        named = plain if self.parameters == _SEARCHED else plain | set(self.parameters)
        if both := sorted(named & set(self.fixed.model_dump(exclude_none=True))):
            raise ValueError(f"{', '.join(both)} cannot be both fixed and searched")
        unknown = sorted((plain | set(self.parameters)) - set(PlanOverrides.model_fields))
        if unknown:
            raise ValueError(f"no parameter of a training: {', '.join(unknown)}")
        return self

    @property
    def limits(self) -> Limits:
        """What ends the experiment."""
        return Limits.model_validate({name: getattr(self, name) for name in Limits.model_fields})


def read_spec(path: Path, kind: type[Spec]) -> Spec:
    """An experiment or protocol from a YAML file; a relative `dataset_path` is one beside the file.

    Raises:
        ConfigurationError: the file cannot be read, is no YAML, or holds an unknown name or a wrong value.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(
            f"the specification cannot be read: {error.strerror}", where=path, remedy="Name a YAML file"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"no YAML: {error}", where=path, remedy="Correct it") from error
    spec = spec_of(content, kind, where=path)
    if spec.dataset_path is not None:
        spec = spec.model_copy(update={"dataset_path": (path.parent / spec.dataset_path).absolute()})
    return spec


def spec_of(content: Any, kind: type[Spec], *, where: Path | str) -> Spec:
    """An experiment or protocol from plain values, strictly: a number in quotes is none.

    Raises:
        ConfigurationError: an unknown name or a wrong value.
    """
    try:
        return kind.model_validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'specification'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise ConfigurationError(
            "; ".join(faults), where=where, remedy="docs/search.md has a table of all fields"
        ) from error
