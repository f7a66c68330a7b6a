"""Where everything lies under the data root."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import ConfigurationError

_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,199}")


def path_part(name: str) -> str:
    """`name` itself, if it may be one part of a path: a partition's key or an id can be typed by anyone.

    Raises:
        ConfigurationError: it has a separator or another character that could lead elsewhere, or is too long.
    """
    if not _PATH_PART.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot be part of a path",
            remedy="Dates and ids have letters, digits and _.=+- alone, and start with a letter, a digit or _",
        )
    return name


@dataclass(frozen=True)
class DataLayout:
    """Paths under one data root for one pipeline (``brain`` by default); none leads out of it.

    Args:
        root: the data root, an absolute path.
        pipeline: the loop's name, part of paths so that several loops can share a data root.
    """

    root: Path
    pipeline: str = "brain"

    @property
    def exports(self) -> Path:
        """What arrives; never written by us."""
        return self.root / "datasets" / self.pipeline

    def prepared(self, date: str, fingerprint: str) -> Path:
        """``train.jsonl``, ``eval.jsonl``, ``rejects.jsonl`` of one date's window."""
        return self.root / "prepared" / self.pipeline / path_part(date) / path_part(fingerprint)

    def adapter(self, run_id: str) -> Path:
        """One adapter in PEFT's layout with its model card and training log."""
        return self.root / "adapters" / self.pipeline / path_part(run_id)

    def model(self, run_id: str, part: str) -> Path:
        """A product of one training: ``merged``, ``gguf``, ``ollama``, ``lmstudio`` or ``evaluation``."""
        return self.root / "models" / path_part(run_id) / path_part(part)

    def experiment(self, name: str) -> Path:
        """The report of one search."""
        return self.root / "experiments" / self.pipeline / path_part(name)

    @property
    def base_losses(self) -> Path:
        """Losses of base models on single records, by what was measured."""
        return self.root / "base_losses"

    @property
    def configurations(self) -> Path:
        """The best configurations of searches, each named by its SHA-256."""
        return self.root / "configurations"

    @property
    def registry(self) -> Path:
        """``v1``, ``v2``, ... and the champion's pointer."""
        return self.root / "registry" / self.pipeline

    @property
    def base_models(self) -> Path:
        """The embedded base model, the hub's cache and base GGUF files."""
        return self.root / "base_models"

    def work(self, run_id: str) -> Path:
        """Checkpoints and other state of work in progress; never part of an artifact."""
        return self.root / "work" / path_part(run_id)

    @property
    def asset_values(self) -> Path:
        """The small JSON values that assets hand to each other."""
        return self.root / "assets"

    @property
    def postgres(self) -> Path:
        """The embedded PostgreSQL's data directory."""
        return self.root / "postgres"
