"""Fixed prompts whose answers must keep to what is expected of them, or the adapter is not promoted.

A case is a line of a ``*.jsonl`` file:

```json
{"id": "capital", "prompt": "Name the capital of France.", "expect": {"contains": ["Paris"]}}
```

``prompt`` or ``messages`` asks; ``expect`` holds one or more of ``equals`` (case, white space and a last
full stop do not count), ``contains`` and ``excludes`` (lists of texts, case does not count) and ``matches``
(a regular expression, searched for).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from finetune.dataset.records import Message
from finetune.errors import ConfigurationError
from finetune.evaluation.models import FailedRegression
from finetune.evaluation.statistics import normalised
from finetune.publishing import sha256_json

_REMEDY = "Correct the line, or remove it"


class Expectation(BaseModel):
    """What an answer must be like; at least one of the four is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    equals: str | None = None
    contains: list[str] = []
    excludes: list[str] = []
    matches: str | None = None

    @field_validator("matches")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _expects_something(self) -> Self:
        if self.equals is None and self.matches is None and not self.contains and not self.excludes:
            raise ValueError("give one of equals, contains, excludes and matches")
        return self

    def faults(self, answer: str) -> list[str]:
        """Why an answer is not as expected; empty if it is."""
        folded = answer.casefold()
        found = []
        if self.equals is not None and normalised(answer) != normalised(self.equals):
            found.append(f"is not {self.equals!r}")
        found += [f"lacks {text!r}" for text in self.contains if text.casefold() not in folded]
        found += [f"contains {text!r}" for text in self.excludes if text.casefold() in folded]
        if self.matches is not None and not re.search(self.matches, answer):
            found.append(f"does not match {self.matches!r}")
        return found


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Regression(BaseModel):
    """One case: a conversation that the model shall continue, and what is expected of its answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    prompt: str | None = None
    messages: list[Turn] = []
    expect: Expectation
    max_new_tokens: int = Field(64, ge=1, le=1024)

    @model_validator(mode="after")
    def _asks_once(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either prompt or messages")
        return self

    @property
    def conversation(self) -> list[Message]:
        """The turns up to the answer."""
        if self.prompt is not None:
            return [Message(role="user", content=self.prompt)]
        return [Message(role=turn.role, content=turn.content) for turn in self.messages]


def read_regressions(directory: Path) -> list[Regression]:
    """All cases of a directory's ``*.jsonl`` files, by file name and line.

    Raises:
        ConfigurationError: the directory is missing, a line is not a case, or two have the same id.
    """
    if not directory.is_dir():
        raise ConfigurationError(
            "the directory of regression prompts is missing", where=directory, remedy="Create it, or name another one"
        )
    cases: dict[str, Regression] = {}
    for path in sorted(directory.glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                case = Regression.model_validate_json(line)
            except ValidationError as error:
                raise ConfigurationError(
                    f"line {number} is not a regression case: {error}", where=path, remedy=_REMEDY
                ) from error
            if case.id in cases:
                raise ConfigurationError(f"line {number} repeats the id {case.id}", where=path, remedy=_REMEDY)
            cases[case.id] = case
    return list(cases.values())


def fingerprint(cases: Sequence[Regression]) -> str:
    """SHA-256 of the cases."""
    return sha256_json([case.model_dump() for case in cases])


def failures(cases: Sequence[Regression], answers: Sequence[str]) -> list[FailedRegression]:
    """The cases whose answer is not as expected."""
    return [
        FailedRegression(
            id=case.id,
            prompt="\n".join(turn["content"] for turn in case.conversation),
            answer=answer,
            why="; ".join(faults),
        )
        for case, answer in zip(cases, answers, strict=True)
        if (faults := case.expect.faults(answer))
    ]
