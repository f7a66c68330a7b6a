"""A published measurement as an estimate: whose program it was, its settings, the model; why it is left out, if so."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.planning.framework import TRL, Framework
from finetune.planning.memory import estimate_memory
from finetune.planning.model_config import ModelShape, read_model_shape
from finetune.planning.models import TrialConfig

HERE = Path(__file__).parent
# What a card has, in GB (10^9 bytes).
CARDS = {"A100-40G": 42.5, "A10G": 23.8}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        source: repository, commit and file that published it.
        name: model, method and what else tells it from the others.
        measured: peak in GB (10^9 bytes), or None where memory ran out.
        shape: the model.
        trial: the settings.
        framework: whose training it was.
        limit_gb: what the card has, where it is told.
        reason: why the row is left out of the summary; empty if it is in.
    """

    source: str
    name: str
    measured: float | None
    shape: ModelShape
    trial: TrialConfig
    framework: Framework
    limit_gb: float | None = None
    reason: str = ""

    @property
    def estimated(self) -> float:
        """The peak in GB."""
        return estimate_memory(self.shape, self.trial, framework=self.framework).vram_gb

    @property
    def error(self) -> float:
        """Estimated against measured: 0.1 is 10 % too much."""
        assert self.measured is not None
        return self.estimated / self.measured - 1

    @property
    def needed_gb(self) -> float:
        """What a card must have: also what PyTorch's own figures leave out, as in any plan."""
        framework = replace(self.framework, context_gb=TRL.context_gb, fragmentation=TRL.fragmentation)
        return estimate_memory(self.shape, self.trial, framework=framework).vram_gb


def shape_of(name: str) -> ModelShape:
    """The model of that name under ``models/``."""
    return read_model_shape(HERE / "models" / name)


def read_table(name: str) -> list[dict[str, str]]:
    """The lines of a table beside this file."""
    with (HERE / name).open(newline="") as stream:
        return list(csv.DictReader(stream))
