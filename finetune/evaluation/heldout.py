"""The held-out records: read, encoded as training does, and a fixed sample of their questions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from finetune.chat.encode import EncodedRecord, RecordEncoder
from finetune.dataset.normalization import normalized
from finetune.dataset.records import as_messages, prompt_text
from finetune.errors import DatasetError
from finetune.evaluation.scoring import cut, target_count

_REMEDY = "Give it the eval.jsonl of a prepared dataset"


@dataclass(frozen=True)
class HeldOut:
    """Records that can be scored: `lines` are theirs in the file, from 1; `skipped` had nothing left to score."""

    path: Path
    records: list[Mapping[str, Any]]
    encoded: list[EncodedRecord]
    lines: list[int]
    truncated: int
    skipped: int


@dataclass(frozen=True)
class Question:
    """A conversation up to its last answer, and that answer."""

    prompt: str
    reference: str
    prompt_ids: list[int]
    reference_tokens: int


def read_heldout(dataset: Path, encoder: RecordEncoder, *, max_length: int) -> HeldOut:
    """Read a JSONL file of records and encode it.

    Raises:
        DatasetError: the file cannot be read, holds a bad line, or nothing that can be scored.
    """
    records: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    try:
        with dataset.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                records.append(_record(line, number, dataset))
                numbers.append(number)
    except OSError as error:
        raise DatasetError(f"the held-out records cannot be read: {error}", where=dataset, remedy=_REMEDY) from error
    try:
        encoded = encoder.encode(records)
    except DatasetError as error:
        raise DatasetError(error.what, where=dataset, remedy=error.remedy) from error
    truncated = sum(len(record.input_ids) > max_length for record in encoded)
    encoded = [cut(record, max_length) for record in encoded]
    scored = [index for index, record in enumerate(encoded) if target_count(record)]
    if not scored:
        raise DatasetError(
            f"nothing to evaluate: none of {len(records)} records has an answer within {max_length} tokens",
            where=dataset,
            remedy="Raise eval_fraction, bring more exports, or raise max_length",
        )
    return HeldOut(
        path=dataset,
        records=[records[index] for index in scored],
        encoded=[encoded[index] for index in scored],
        lines=[numbers[index] for index in scored],
        truncated=truncated,
        skipped=len(records) - len(scored),
    )


def other_prompts(held_out: HeldOut, prompts: Collection[str]) -> NDArray[np.intp]:
    """Indices of the records that ask none of the prompts, however white space and accents are written."""
    asked = {normalized(prompt) for prompt in prompts}
    if not asked:
        return np.arange(len(held_out.records))
    return np.array(
        [i for i, record in enumerate(held_out.records) if normalized(prompt_text(record)) not in asked], int
    )


def _record(line: bytes, number: int, dataset: Path) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DatasetError(f"line {number} is not JSON: {error}", where=dataset, remedy=_REMEDY) from error
    if not isinstance(record, dict):
        raise DatasetError(f"line {number} is not an object", where=dataset, remedy=_REMEDY)
    return record


def sample_questions(
    records: list[Mapping[str, Any]], encoder: RecordEncoder, *, count: int, max_length: int, seed: int
) -> list[Question]:
    """Up to `count` conversations drawn with a seed, in the file's order; plain texts ask nothing."""
    drawn = np.random.default_rng(seed).permutation(len(records))
    chosen: dict[int, Question] = {}
    for index in drawn.tolist():
        if len(chosen) == count:
            break
        turns = as_messages(records[index])
        if turns is None or turns[-1]["role"] != "assistant":
            continue
        reference = turns[-1]["content"]
        prompt_ids = encoder.encode_prompt(turns[:-1])
        if len(prompt_ids) >= max_length:
            continue
        length = len(encoder.encode_prompt(turns)) - len(prompt_ids)
        asked = "\n".join(turn["content"] for turn in turns[:-1] if turn["role"] == "user")
        chosen[index] = Question(asked, reference, prompt_ids, length)
    return [chosen[index] for index in sorted(chosen)]
