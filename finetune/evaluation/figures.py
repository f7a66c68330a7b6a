"""The figures of a report, from the scores of base and adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune.dataset.records import as_messages, prompt_text, record_format, source_of
from finetune.evaluation.heldout import HeldOut, Question
from finetune.evaluation.models import Answer, Group, Worsened
from finetune.evaluation.scoring import Scores
from finetune.evaluation.statistics import bootstrap_ci95, chrf, exact_match

RESAMPLES = 2000
_SOURCES = 20
_WORST = 10
# Characters up to which an answer can be expected to be word for word.
_SHORT_REFERENCE = 200


def loss_figures(base: Scores, ours: Scores, *, seed: int) -> dict[str, Any]:
    """Losses, perplexities and accuracies of both, and the change with its confidence interval."""
    return {
        "eval_loss": ours.loss,
        "eval_perplexity": _perplexity(ours.loss),
        "base_loss": base.loss,
        "base_perplexity": _perplexity(base.loss),
        "delta_vs_base_loss": ours.loss - base.loss,
        "delta_ci95": change_ci95(base, ours, seed=seed),
        "token_accuracy": ours.accuracy,
        "base_token_accuracy": base.accuracy,
        "tokens": int(ours.tokens.sum()),
    }


def change_ci95(before: Scores, after: Scores, *, seed: int) -> tuple[float, float]:
    """95 % confidence interval of the change in loss, by the bootstrap over records."""
    return bootstrap_ci95(after.nats - before.nats, after.tokens, resamples=RESAMPLES, seed=seed)


def answer_figures(questions: Sequence[Question], base: Sequence[str], ours: Sequence[str]) -> dict[str, Any]:
    """Answers side by side; exact match and chrF over those whose reference is short, None where there is none."""
    answers = [
        Answer(prompt=question.prompt, reference=question.reference, base=theirs, adapter=answer)
        for question, theirs, answer in zip(questions, base, ours, strict=True)
    ]
    short = [index for index, question in enumerate(questions) if len(question.reference) <= _SHORT_REFERENCE]
    if not short:
        return {"answers": answers} | dict.fromkeys(("exact_match", "base_exact_match", "chrf", "base_chrf"))
    references = [questions[index].reference for index in short]

    def both(figure: Callable[[Sequence[str], Sequence[str]], float], name: str) -> dict[str, float | None]:
        return {
            name: figure([ours[index] for index in short], references),
            f"base_{name}": figure([base[index] for index in short], references),
        }

    return {"answers": answers} | both(exact_match, "exact_match") | both(chrf, "chrf")


def group_figures(held_out: HeldOut, base: Scores, ours: Scores) -> dict[str, Any]:
    """Losses by format, by source and by length, and the records that got worse most."""
    formats = [record_format(record) for record in held_out.records]
    sources = [source_of(record) or "(none)" for record in held_out.records]
    lengths = [_length_bucket(len(record.input_ids)) for record in held_out.encoded]
    return {
        "by_format": _groups(formats, base, ours),
        "by_source": _groups(sources, base, ours)[:_SOURCES],
        "by_length": sorted(_groups(lengths, base, ours), key=lambda group: int(group.name.split("–")[0])),
        "worst": _worst(held_out, base, ours),
    }


def _groups(names: Sequence[str], base: Scores, ours: Scores) -> list[Group]:
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


def _length_bucket(length: int) -> str:
    """The range between two powers of two that `length` lies in: 1–32, 33–64, 65–128, ..."""
    upper = max(32, 1 << (length - 1).bit_length())
    return f"{1 if upper == 32 else upper // 2 + 1}–{upper}"


def _worst(held_out: HeldOut, base: Scores, ours: Scores) -> list[Worsened]:
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


def _perplexity(loss: float) -> float:
    # math.exp overflows above 709, where perplexity says nothing any more.
    return math.exp(min(loss, 700.0))
