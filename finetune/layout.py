"""Where everything lies under the data root."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataLayout:
    """Paths under one data root for one pipeline (``brain`` by default).

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
        return self.root / "prepared" / self.pipeline / date / fingerprint

    def adapter(self, run_id: str) -> Path:
        """One adapter in PEFT's layout with its model card and training log."""
        return self.root / "adapters" / self.pipeline / run_id

    def model(self, run_id: str, part: str) -> Path:
        """A product of one training: ``merged``, ``gguf``, ``ollama``, ``lmstudio`` or ``evaluation``."""
        return self.root / "models" / run_id / part

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
        return self.root / "work" / run_id

    @property
    def asset_values(self) -> Path:
        """The small JSON values that assets hand to each other."""
        return self.root / "assets"

    @property
    def postgres(self) -> Path:
        """The embedded PostgreSQL's data directory."""
        return self.root / "postgres"
