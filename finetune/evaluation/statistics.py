"""Figures over records and texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_DRAWS_AT_A_TIME = 1 << 22


def bootstrap_ci95(
    differences: NDArray[np.float64], tokens: NDArray[np.int64], *, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % confidence interval of ``sum(differences) / sum(tokens)`` by the bootstrap over records.

    Records are drawn, not tokens, because the tokens of one answer are not independent (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). The interval is the expanded percentile
    interval, as wide as Student's would be (Hesterberg, What Teachers Should Know About the Bootstrap, The American
    Statistician 69, 2015, section 4.3): the plain one is too narrow for few records.

    Args:
        differences: shape (records,), difference of two summed losses in nats.
        tokens: shape (records,).
        resamples: how many times as many records are drawn with replacement.
        seed: equal seeds give equal intervals.
    """
    means = _resampled(differences, tokens, resamples, np.random.default_rng(seed))
    return _interval(means, _effective(tokens))


def shift_ci95(
    before: tuple[NDArray[np.float64], NDArray[np.int64]],
    after: tuple[NDArray[np.float64], NDArray[np.int64]],
    *,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95 % confidence interval of the difference in mean loss between two sets of records, ``after - before``.

    The two-sample bootstrap: both sets are drawn anew, each on its own (Efron and Tibshirani, chapter 8), and the
    percentiles are those that `bootstrap_ci95` would take for the smaller one.

    Args:
        before: summed losses in nats and tokens, each of shape (records,).
        after: of the other records.
        resamples: how many times each is drawn with replacement.
        seed: equal seeds give equal intervals.
    """
    generator = np.random.default_rng(seed)
    shifts = _resampled(*after, resamples, generator) - _resampled(*before, resamples, generator)
    return _interval(shifts, min(_effective(before[1]), _effective(after[1])))


def _effective(tokens: NDArray[np.int64]) -> float:
    """How many records of equal length would tell as much (Kish, Survey Sampling, 1965, section 11.2)."""
    return float(tokens.sum() ** 2 / (tokens.astype(np.float64) ** 2).sum())


def _interval(means: NDArray[np.float64], records: float) -> tuple[float, float]:
    """The percentiles of resampled means between which 95 % of Student's distribution lie."""
    from scipy.special import ndtr, stdtrit

    tail = 0.0
    if records > 1:
        tail = float(ndtr(stdtrit(records - 1, 0.025) * np.sqrt(records / (records - 1))))
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def _resampled(
    nats: NDArray[np.float64], tokens: NDArray[np.int64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """``sum(nats) / sum(tokens)`` of records drawn with replacement; shape (resamples,)."""
    count = len(nats)
    rows = max(1, _DRAWS_AT_A_TIME // count)
    means = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, count, size=(min(rows, resamples - start), count))
        means.append(nats[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    return np.concatenate(means)


def normalised(text: str) -> str:
    """Case folded, white space collapsed, without a full stop at the end."""
    return " ".join(text.casefold().split()).rstrip(".")


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers equal to their reference after `normalised`."""
    equal = [normalised(answer) == normalised(reference) for answer, reference in zip(answers, references, strict=True)]
    return sum(equal) / len(equal)


def chrf(answers: Sequence[str], references: Sequence[str], *, order: int = 6, beta: float = 2.0) -> float:
    """Corpus chrF2 from 0 to 100: F-score of character n-grams without white space.

    Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015; counted as
    sacrebleu 2 does (n-gram orders that occur in neither text do not count).
    """
    matched, in_answers, in_references = np.zeros(order), np.zeros(order), np.zeros(order)
    for answer, reference in zip(answers, references, strict=True):
        for index in range(order):
            ours, theirs = _ngrams(answer, index + 1), _ngrams(reference, index + 1)
            # Without n-grams on one side, the other's say nothing about precision or recall.
            in_answers[index] += ours.total() if theirs else 0
            in_references[index] += theirs.total()
            matched[index] += (ours & theirs).total()
    counted = (in_answers > 0) & (in_references > 0)
    if not counted.any():
        return 0.0
    precision = (matched[counted] / in_answers[counted]).mean()
    recall = (matched[counted] / in_references[counted]).mean()
    if precision + recall == 0:
        return 0.0
    return float(100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall))


def _ngrams(text: str, length: int) -> Counter[str]:
    characters = "".join(text.split())
    return Counter(characters[start : start + length] for start in range(len(characters) - length + 1))
