"""A curriculum as a person writes it down: named stages in order, what each is trained on, and how.

Bengio et al., "Curriculum Learning", ICML 2009: easy records first. What is easy is measured, or said by a column;
or a person has sorted the records into files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from finetune.planning.models import TrainableMethod
from finetune.search.spec import TrainingSpec, read_spec

Difficulty = Literal["length", "base_loss", "score"]
Source = Literal["files", "exports", "difficulty"]

# The training that sees the same data in no order.
COMPARISON = "shuffled"


class StageSpec(BaseModel):
    """One stage: where its records come from, and what of the plan is another one in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,59}$")
    # files of records, JSONL
    files: list[Path] = []
    # names of exports, of which the dataset's training records are taken
    exports: list[str] = []
    # of the dataset's training records, by difficulty; equal shares where no stage says
    share: float | None = Field(None, gt=0, lt=1)
    # None is the plan's
    epochs: float | None = Field(None, gt=0)
    learning_rate: float | None = Field(None, gt=0)
    # share of the records of all earlier stages that are mixed in
    replay: float = Field(0.0, ge=0, le=1)


class CurriculumSpec(TrainingSpec):
    """All fields of a curriculum: its stages name files, or exports, or are made by difficulty."""

    method: TrainableMethod | None = None
    by: Difficulty | None = None
    # the column of `by: score`, or its path such as meta.quality
    score: str | None = Field(None, min_length=1)
    # the highest first
    descending: bool = False
    stages: list[StageSpec] = Field(min_length=2)

    @field_validator("stages")
    @classmethod
    def _each_once(cls, stages: list[StageSpec]) -> list[StageSpec]:
        for field in ("name", "files", "exports"):
            names = [getattr(stage, field) for stage in stages]
            flat = names if field == "name" else [each for some in names for each in some]
            if twice := [str(each) for each, count in Counter(flat).items() if count > 1]:
                raise ValueError(f"{field} {', '.join(twice)} stands there twice")
        if any(stage.name == COMPARISON for stage in stages):
            raise ValueError(f"name {COMPARISON} is that of the training which the stages are compared with")
        if stages[0].replay:
            raise ValueError(f"replay of {stages[0].name}: nothing comes before the first stage")
        for field in ("files", "exports", "share"):
            if 0 < sum(bool(getattr(stage, field)) for stage in stages) < len(stages):
                raise ValueError(f"{field}: every stage has it, or none")
        if all(stage.share for stage in stages) and not math.isclose(total := sum(s.share or 0 for s in stages), 1):
            raise ValueError(f"share: all together are {total:g} instead of 1")
        return stages

    @model_validator(mode="after")
    def _fitting(self) -> CurriculumSpec:
        first = self.stages[0]
        if first.files and first.exports:
            raise ValueError("stages: files and exports exclude each other")
        if self.source == "difficulty":
            if self.by is None:
                raise ValueError("by: say length, base_loss or score, or give each stage its files or exports")
        elif self.by or self.descending or first.share:
            raise ValueError("by, descending and share are for stages without files and exports")
        if (self.by == "score") != (self.score is not None):
            raise ValueError("score: the column goes with by: score, and by: score with a column")
        if self.fixed.max_steps is not None:
            raise ValueError("fixed.max_steps: the steps of a stage follow from its records and epochs")
        if self.fixed.use_pissa:
            raise ValueError("fixed.use_pissa: the second stage starts from the adapter of the first, and PiSSA cannot")
        return self

    @property
    def source(self) -> Source:
        """Where the stages' records come from."""
        return "files" if self.stages[0].files else "exports" if self.stages[0].exports else "difficulty"

    @property
    def shares(self) -> list[float]:
        """The stages' shares, together 1."""
        return [stage.share or 1 / len(self.stages) for stage in self.stages]

    def pinned(self, digests: Mapping[Path, str]) -> CurriculumSpec:
        """The same with the contents of files in the place of their paths, for `identity`.

        Args:
            digests: the files' SHA-256.
        """
        stages = [
            stage.model_copy(update={"files": [Path(digests[path]) for path in stage.files]}) for stage in self.stages
        ]
        return self.model_copy(update={"stages": stages})


def read_curriculum(path: Path) -> CurriculumSpec:
    """A curriculum from a YAML file; relative paths are beside the file.

    Raises:
        ConfigurationError: the file cannot be read, is no YAML, or holds an unknown name or a wrong value.
    """
    spec = read_spec(path, CurriculumSpec)
    stages = [
        stage.model_copy(update={"files": [(path.parent / file).absolute() for file in stage.files]})
        for stage in spec.stages
    ]
    return spec.model_copy(update={"stages": stages})
