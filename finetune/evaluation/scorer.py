"""Held-out records under one model after the other; losses that are no numbers are refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.chat.encode import RecordEncoder
from finetune.errors import ArtifactError
from finetune.evaluation.heldout import HeldOut
from finetune.evaluation.scoring import Scores, score
from finetune.progress import Progress, ProgressEvent

if TYPE_CHECKING:
    from torch.nn import Module


class Scorer:
    """Scores held-out records, and tells how many of all are done.

    Args:
        encoder: of the models' tokenizer.
        stage: what listeners are told of.
        total: records that will be scored, under all models together.
        on_progress: told of every batch.
    """

    def __init__(self, encoder: RecordEncoder, stage: str, total: int, on_progress: Progress) -> None:
        self._encoder, self._stage, self._total, self._on_progress = encoder, stage, total, on_progress
        self._done = 0

    def __call__(self, model: Module, held_out: HeldOut, *, name: str, where: Path) -> Scores:
        """The losses of the records under a model.

        Args:
            model: a causal language model of transformers, with or without an adapter of PEFT.
            held_out: the records.
            name: of the model, for a person.
            where: its directory.

        Raises:
            ArtifactError: a loss is no number.
        """
        scores = score(
            model,
            held_out.encoded,
            vocabulary=model.config.get_text_config().vocab_size,
            pad_token_id=self._encoder.pad_token_id,
            after_batch=self._tell,
        )
        broken = np.flatnonzero(~np.isfinite(scores.nats))
        if len(broken):
            raise ArtifactError(
                f"{name} gives losses that are no numbers, first on line {held_out.lines[broken[0]]} "
                f"of {held_out.path.name}",
                where=where,
                remedy="Its weights hold NaN or infinity: train again with a lower learning rate, or roll back to "
                "another version",
            )
        return scores

    def _tell(self, records: int) -> None:
        self._done += records
        self._on_progress(ProgressEvent(self._stage, self._done, self._total, "records"))
