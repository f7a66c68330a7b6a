"""Losses of records under a model, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune.chat.encode import EncodedRecord

if TYPE_CHECKING:
    from torch.nn import Module

# Logits are the largest tensor: 2^28 of them are 1 GiB in float32.
_MAX_LOGITS = 1 << 28
_MAX_TOKENS = 4096


@dataclass(frozen=True)
class Scores:
    """Per record: summed loss in nats, trained tokens, and those of them that greedy decoding would have chosen."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    correct: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Mean over all tokens, in nats."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean of each record, in nats per token."""
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float:
        """Share of tokens that greedy decoding would have chosen."""
        return float(self.correct.sum() / self.tokens.sum())

    def of(self, records: NDArray[np.intp]) -> Scores:
        """Those of some records, by their indices."""
        return Scores(self.nats[records], self.tokens[records], self.correct[records])


def cut(record: EncodedRecord, max_length: int) -> EncodedRecord:
    """The first `max_length` tokens, as training cuts them."""
    return EncodedRecord(record.input_ids[:max_length], record.trained_mask[:max_length])


def target_count(record: EncodedRecord) -> int:
    """Tokens whose loss counts: the first of a sequence is predicted from nothing and never does."""
    return sum(record.trained_mask[1:])


def batches(records: Sequence[EncodedRecord], *, vocabulary: int) -> Iterator[list[int]]:
    """Indices of records, longest first, so that little is padding and running out of memory shows at once."""
    budget = max(1, min(_MAX_TOKENS, _MAX_LOGITS // vocabulary))
    order = sorted(range(len(records)), key=lambda index: -len(records[index].input_ids))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(records[batch[0]].input_ids) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def score(
    model: Module,
    records: Sequence[EncodedRecord],
    *,
    vocabulary: int,
    pad_token_id: int,
    after_batch: Callable[[int], None],
) -> Scores:
    """Cross-entropy of each record's trained tokens.

    Args:
        model: a causal language model of transformers, with or without an adapter of PEFT.
        records: at least one target token each.
        vocabulary: size of the vocabulary, which bounds the batches.
        pad_token_id: fills up shorter records, behind an attention mask.
        after_batch: told how many records were done.

    Returns:
        Arrays of shape (records,), in the records' order.
    """
    import torch
    from torch.nn.functional import cross_entropy

    nats = np.zeros(len(records))
    tokens = np.zeros(len(records), dtype=np.int64)
    correct = np.zeros(len(records), dtype=np.int64)
    device = next(model.parameters()).device
    for batch in batches(records, vocabulary=vocabulary):
        width = len(records[batch[0]].input_ids)
        ids = torch.full((len(batch), width), pad_token_id)
        attention = torch.zeros((len(batch), width), dtype=torch.long)
        trained = torch.zeros((len(batch), width), dtype=torch.bool)
        for row, index in enumerate(batch):
            length = len(records[index].input_ids)
            ids[row, :length] = torch.tensor(records[index].input_ids)
            attention[row, :length] = 1
            trained[row, :length] = torch.tensor(records[index].trained_mask, dtype=torch.bool)
        targets = trained[:, 1:]
        # Prompts need no logits: only positions before a target of any record are projected.
        positions = targets.any(dim=0).nonzero().squeeze(1)
        with torch.inference_mode():
            logits = model(
                input_ids=ids.to(device),
                attention_mask=attention.to(device),
                logits_to_keep=positions.to(device),
                use_cache=False,
            ).logits
            if logits.shape[1] != len(positions):
                logits = logits[:, positions]
            chosen = targets[:, positions]
            kept = logits[chosen.to(device)].float()
            wanted = ids[:, positions + 1][chosen].to(device)
            losses = cross_entropy(kept, wanted, reduction="none").double().cpu().numpy()
            hits = (kept.argmax(dim=-1) == wanted).cpu().numpy()
        rows = chosen.nonzero()[:, 0].numpy()
        nats[batch] = np.bincount(rows, weights=losses, minlength=len(batch))
        tokens[batch] = np.bincount(rows, minlength=len(batch))
        correct[batch] = np.bincount(rows, weights=hits, minlength=len(batch)).astype(np.int64)
        after_batch(len(batch))
    return Scores(nats, tokens, correct)
