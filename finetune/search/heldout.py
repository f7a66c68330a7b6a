"""The held-out loss of a model while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.chat.encode import RecordEncoder
from finetune.evaluation.heldout import read_heldout
from finetune.evaluation.scoring import score

if TYPE_CHECKING:
    from torch.nn import Module

# A ranking of trials needs no more, and a rung must cost little beside the steps that it may save.
_RECORDS = 256


class HeldOutLoss:
    """Called with a model in training, gives its loss in nats per token on the first records of a file.

    The model is left as it was, in training, and nothing random is drawn, so that the training goes on to the bit
    as if nobody had looked.

    Args:
        dataset: held-out records, JSONL.
        base_model: directory of the base model, for its tokenizer and chat template.
        max_length: records are cut at so many tokens, as in training.

    Raises:
        DatasetError: no held-out record can be scored.
        BaseModelError: the tokenizer is missing or damaged.
    """

    def __init__(self, dataset: Path, base_model: Path, *, max_length: int) -> None:
        self._encoder = RecordEncoder.load(base_model)
        self._records = read_heldout(dataset, self._encoder, max_length=max_length).encoded[:_RECORDS]

    def __call__(self, model: Module) -> float:
        """The mean over all tokens of the assistant's side."""
        was_training = model.training
        model.eval()
        try:
            return score(
                model,
                self._records,
                vocabulary=model.config.get_text_config().vocab_size,
                pad_token_id=self._encoder.pad_token_id,
                after_batch=lambda records: None,
            ).loss
        finally:
            model.train(was_training)
