"""Checks of the batches that the trainer really makes, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.errors import TrainingError
from finetune.training.data import IGNORED_LABEL, Ints, TrainingData

if TYPE_CHECKING:
    from trl import SFTTrainer

# Logits of one record alone and behind another differ by rounding at most, or attention leaks.
_TOLERANCE = 0.05


def refuse_wrong_labels(trainer: SFTTrainer, data: TrainingData, order: Ints, first: Sequence[int]) -> None:
    """See that the first micro-batch holds exactly our tokens and labels.

    Args:
        trainer: ready for its first step.
        data: the records.
        order: their indices in the order in which they are trained.
        first: the micro-batch, by places in that order.

    Raises:
        TrainingError: it does not.
    """
    batch = trainer.data_collator([trainer.train_dataset[place] for place in first])
    kept = batch["attention_mask"].bool() if "attention_mask" in batch else batch["input_ids"] >= 0
    seen = list(zip(batch["input_ids"][kept].tolist(), batch["labels"][kept].tolist(), strict=True))
    start = 0
    for index in order[first]:
        record = slice(int(data.offsets[index]), int(data.offsets[index + 1]))
        ours = list(zip(data.input_ids[record].tolist(), data.labels[record].tolist(), strict=True))
        # Nothing comes before a first token, so nobody predicts it; batches without padding mask it.
        ours[0] = (ours[0][0], seen[start][1] if seen[start][1] == IGNORED_LABEL else ours[0][1])
        if seen[start : start + len(ours)] != ours:
            raise TrainingError(
                f"the trainer would learn other tokens of line {data.lines[index]} than those that are to be learned",
                where="SFTTrainer's batches",
                remedy="The installed version of TRL treats labels otherwise; install the pinned one",
            )
        start += len(ours)
    if start != len(seen):
        raise TrainingError(
            f"the trainer's first batch has {len(seen)} tokens instead of {start}",
            where="SFTTrainer's batches",
            remedy="The installed version of TRL makes batches otherwise; install the pinned one",
        )


def refuse_leaking_attention(trainer: SFTTrainer, data: TrainingData, order: Ints) -> None:
    """See that a record behind another one in a packed batch sees itself alone.

    Raises:
        TrainingError: its logits depend on the record before it.
    """
    import torch

    if len(order) < 2:
        return
    model = trainer.model
    rows = [trainer.train_dataset[i] for i in range(2)]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        both, alone = (
            model(
                input_ids=batch["input_ids"].to(model.device),
                position_ids=batch["position_ids"].to(model.device),
                use_cache=False,
            ).logits[0]
            for batch in (trainer.data_collator(rows), trainer.data_collator(rows[1:]))
        )
    model.train(was_training)
    difference = float((both[-len(alone) :] - alone).abs().max())
    if difference > _TOLERANCE * max(1.0, float(alone.abs().max())):
        lines = [int(data.lines[index]) for index in order[:2]]
        raise TrainingError(
            f"packed records see each other: the logits of line {lines[1]} change by {difference:.3g} "
            f"when line {lines[0]} is put before it",
            where=f"attention {trainer.model.config._attn_implementation}",
            remedy="Turn packing off, or choose another attention implementation",
        )
