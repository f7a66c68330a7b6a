"""Looking at a prepared dataset, without trusting what its manifest says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson
from xxhash import xxh3_64_intdigest

from finetune.dataset.normalization import normalized
from finetune.dataset.records import Message, as_messages, prompt_text
from finetune.errors import DatasetError


def count_lines(path: Path) -> int:
    """How many lines a file holds; a last one without a line feed counts."""
    with path.open("rb") as stream:
        return sum(1 for _ in stream)


def leaked_prompts(train: Path, held_out: Path) -> list[str]:
    """Prompts of `held_out` that, normalised, stand in `train` too; in order of `held_out`.

    Memory: the held-out side's hashes, 64 bits each.

    Raises:
        DatasetError: a line is no record.
    """
    asked = {_digest(prompt): prompt for prompt in _prompts(held_out)}
    leaked = {digest for prompt in _prompts(train) if (digest := _digest(prompt)) in asked}
    return [prompt for digest, prompt in asked.items() if digest in leaked]


def held_out_prompts(held_out: Path, limit: int) -> list[list[Message]]:
    """The first `limit` conversations up to their first answer, without it; plain texts are passed over.

    Raises:
        DatasetError: a line is no record.
    """
    prompts: list[list[Message]] = []
    for record in _records(held_out):
        turns = as_messages(record)
        if turns is not None:
            answer = next(number for number, turn in enumerate(turns) if turn["role"] == "assistant")
            prompts.append(turns[:answer])
            if len(prompts) == limit:
                break
    return prompts


def _digest(prompt: str) -> int:
    return xxh3_64_intdigest(normalized(prompt))


def _prompts(path: Path) -> Iterator[str]:
    return (prompt_text(record) for record in _records(path))


def _records(path: Path) -> Iterator[dict[str, object]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DatasetError(
                    f"line {number} is not a record: {error}",
                    where=path,
                    remedy="The prepared dataset was altered: delete its directory and materialize again",
                ) from error
