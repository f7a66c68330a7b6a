"""Each held-out record's losses, kept beside a report so that adapters can be compared record by record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune.errors import ArtifactError

if TYPE_CHECKING:
    from finetune.evaluation.heldout import HeldOut
    from finetune.evaluation.measure import Measured

_NAME = "losses.json"


class RecordLosses(BaseModel):
    """Per record that was scored: its line in the file, from 1, its trained tokens, and its summed losses in nats."""

    model_config = ConfigDict(frozen=True)

    lines: list[int]
    tokens: list[int]
    base_nats: list[float]
    nats: list[float]


def write_losses(directory: Path, held_out: HeldOut, measured: Measured) -> None:
    """Write ``losses.json`` into a report's directory."""
    losses = RecordLosses(
        lines=held_out.lines,
        tokens=measured.adapter.tokens.tolist(),
        base_nats=measured.base.nats.tolist(),
        nats=measured.adapter.nats.tolist(),
    )
    (directory / _NAME).write_text(losses.model_dump_json() + "\n", encoding="utf-8")


def read_losses(directory: Path) -> RecordLosses:
    """The losses that lie beside a report, exactly as they were measured.

    Raises:
        ArtifactError: there are none, or they were altered.
    """
    path = directory / _NAME
    try:
        return RecordLosses.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            "the records' losses cannot be read", where=path, remedy="Delete the directory and evaluate again"
        ) from error
