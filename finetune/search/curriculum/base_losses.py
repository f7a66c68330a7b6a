"""The base model's loss on single records, each measured once and kept by what was measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import EncodedRecord
from finetune.errors import ArtifactError, BaseModelError
from finetune.evaluation.adapters import load_base
from finetune.evaluation.scoring import cut, score
from finetune.progress import Progress, ProgressEvent
from finetune.publishing import sha256_json, write_bytes_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# To be raised when losses come to be measured otherwise.
_METHOD = 1
_ROW = np.dtype([("record", "S32"), ("loss", "<f8")])


class BaseLosses:
    """Mean losses in nats per trained token, NaN for a record without one; what is missing is measured and kept.

    A record is known by its tokens and which of them are trained. Each call's measurements are one file, written whole
    or not at all, so that whoever is killed measures again what one call had begun.

    Args:
        directory: where losses are kept, of whatever models.
        base_model: loaded when the first loss is missing.
        max_length: records are cut at so many tokens, as in training.
        pad_token_id: fills batches up.
        on_progress: told of what is measured.
    """

    def __init__(
        self, directory: Path, base_model: BaseModelRef, *, max_length: int, pad_token_id: int, on_progress: Progress
    ) -> None:
        self._directory = directory / sha256_json([_METHOD, base_model.fingerprint, max_length])[:16]
        self._base_model = base_model
        self._max_length = max_length
        self._pad_token_id = pad_token_id
        self._on_progress = on_progress
        self._measured = 0

    def __call__(self, records: Sequence[EncodedRecord]) -> NDArray[np.float64]:
        """The losses of records, in their order.

        Raises:
            BaseModelError: the base model cannot be loaded, or gives losses that are no numbers.
            ArtifactError: what was kept is damaged.
        """
        shortened = [cut(record, self._max_length) for record in records]
        missing = {
            key: record
            for record in shortened
            if (key := _key(record)) not in self._known and any(record.trained_mask[1:])
        }
        if missing:
            self._known.update(self._measure(missing))
        return self.kept(records)

    def kept(self, records: Sequence[EncodedRecord]) -> NDArray[np.float64]:
        """The losses of records that were measured before, NaN for the others; nothing is measured.

        Raises:
            ArtifactError: what was kept is damaged.
        """
        keys = [_key(cut(record, self._max_length)) for record in records]
        return np.array([self._known.get(key, np.nan) for key in keys])

    @cached_property
    def _known(self) -> dict[bytes, float]:
        known: dict[bytes, float] = {}
        for path in sorted(self._directory.glob("[!.]*.npy")):
            try:
                rows = np.load(path).astype(_ROW)
            except (ValueError, EOFError) as error:
                raise ArtifactError(
                    f"losses of the base model cannot be read: {error}",
                    where=path,
                    remedy="Delete the file: what it held is measured again",
                ) from error
            known.update(zip(rows["record"].tolist(), rows["loss"].tolist(), strict=True))
        return known

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_base(self._base_model)

    def _measure(self, missing: dict[bytes, EncodedRecord]) -> dict[bytes, float]:
        losses = score(
            self._model,
            list(missing.values()),
            vocabulary=self._model.config.get_text_config().vocab_size,
            pad_token_id=self._pad_token_id,
            after_batch=self._tell,
        ).means
        if not np.isfinite(losses).all():
            raise BaseModelError(
                "the base model gives losses that are no numbers",
                where=self._base_model.path,
                remedy="Its weights are damaged: download it again, or set BASE_MODEL_NAME to another model",
            )
        rows = np.array(list(zip(missing, losses.tolist(), strict=True)), _ROW)
        stream = io.BytesIO()
        np.save(stream, rows)
        name = xxh3_128_digest(b"".join(missing)).hex()
        write_bytes_atomically(self._directory / f"{name}.npy", stream.getvalue())
        return dict(zip(missing, losses.tolist(), strict=True))

    def _tell(self, records: int) -> None:
        self._measured += records
        self._on_progress(ProgressEvent("loss of the base model", self._measured, None, "records"))


def _key(record: EncodedRecord) -> bytes:
    tokens = np.array([record.input_ids, record.trained_mask], np.int32)
    # As text: NumPy's byte strings drop zeros at their end.
    return xxh3_128_digest(tokens.tobytes()).hex().encode()
