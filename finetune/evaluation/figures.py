"""The figures of a report, from the scores of base and adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune.dataset.records import as_messages, prompt_text
from finetune.evaluation.heldout import HeldOut, Question
from finetune.evaluation.models import Group, Worsened
from finetune.evaluation.scoring import Scores
from finetune.evaluation.statistics import chrf, exact_match

_WORST = 10
# Characters up to which an answer can be expected to be word for word.
_SHORT_REFERENCE = 200


def perplexity(loss: float) -> float:
    """``exp(loss)``."""
    # math.exp overflows above 709, where perplexity says nothing any more.
    return math.exp(min(loss, 700.0))


def answer_figures(questions: Sequence[Question], base: Sequence[str], ours: Sequence[str]) -> dict[str, float | None]:
    """Exact match and chrF of both models over the questions whose reference is short; None where there is none."""
    short = [index for index, question in enumerate(questions) if len(question.reference) <= _SHORT_REFERENCE]
    if not short:
        return dict.fromkeys(("exact_match", "base_exact_match", "chrf", "base_chrf"))
    references = [questions[index].reference for index in short]

    def both(figure: Callable[[Sequence[str], Sequence[str]], float], name: str) -> dict[str, float | None]:
        return {
            name: figure([ours[index] for index in short], references),
            f"base_{name}": figure([base[index] for index in short], references),
        }

    return both(exact_match, "exact_match") | both(chrf, "chrf")


def groups(names: Sequence[str], base: Scores, ours: Scores) -> list[Group]:
    """Losses of the records that share a name, the largest group first.

    Args:
        names: of each record's group.
        base: scores of the base model.
        ours: scores of the adapter.
    """
    unique, members = np.unique(np.array(names), return_inverse=True)
    tokens = np.bincount(members, weights=ours.tokens)
    base_nats, nats = np.bincount(members, weights=base.nats), np.bincount(members, weights=ours.nats)
    records = np.bincount(members)
    return [
        Group(
            name=str(unique[index]),
            records=int(records[index]),
            tokens=int(tokens[index]),
            base_loss=float(base_nats[index] / tokens[index]),
            eval_loss=float(nats[index] / tokens[index]),
        )
        for index in np.argsort(-records, kind="stable")
    ]


def length_bucket(length: int) -> str:
    """The range between two powers of two that `length` lies in: 1–32, 33–64, 65–128, ..."""
    upper = max(32, 1 << (length - 1).bit_length())
    return f"{1 if upper == 32 else upper // 2 + 1}–{upper}"


def worst(held_out: HeldOut, base: Scores, ours: Scores) -> list[Worsened]:
    """The records whose mean loss rose most, the worst first."""
    change = (ours.nats - base.nats) / ours.tokens
    return [
        Worsened(
            line=held_out.lines[index],
            prompt=prompt_text(held_out.records[index])[:2000],
            reference=_last_turn(held_out.records[index])[:2000],
            base_loss=float(base.nats[index] / base.tokens[index]),
            eval_loss=float(ours.nats[index] / ours.tokens[index]),
        )
        for index in np.argsort(-change, kind="stable")[:_WORST]
        if change[index] > 0
    ]


def _last_turn(record: Mapping[str, Any]) -> str:
    turns = as_messages(record)
    return "" if turns is None else turns[-1]["content"]
