"""How a combination of adapters is judged: on held-out records that did not choose its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from finetune.errors import DatasetError
from finetune.evaluation.figures import RESAMPLES
from finetune.evaluation.losses import RecordLosses
from finetune.evaluation.statistics import bootstrap_ci95
from finetune.registry.champion import LEAST_RECORDS
from finetune.search.ensemble.result import Figures, Verdict

_FEWEST_RECORDS = 4


@dataclass(frozen=True)
class Halves:
    """Held-out records by their place among those that were scored: what weighs the members, and what judges."""

    selection: list[int]
    judging: list[int]


def halves(dataset: Path, lines: Sequence[int]) -> Halves:
    """Split held-out records in two by the SHA-256 of each, so that neither their order nor chance decides.

    Args:
        dataset: held-out records, JSONL.
        lines: those that were scored, by their number from 1.

    Raises:
        DatasetError: there are too few.
    """
    if len(lines) < _FEWEST_RECORDS:
        raise DatasetError(
            f"{len(lines)} held-out records are too few: half of them weighs the members, the other half judges",
            where=dataset,
            remedy=f"Bring more data, or raise EVAL_FRACTION, until {_FEWEST_RECORDS} can be scored",
        )
    scored = set(lines)
    with dataset.open("rb") as stream:
        digests = [hashlib.sha256(line.strip()).digest() for number, line in enumerate(stream, 1) if number in scored]
    first = set(sorted(range(len(digests)), key=digests.__getitem__)[: len(digests) // 2])
    chosen = [index in first for index in range(len(digests))]
    everything = range(len(digests))
    return Halves(list(compress(everything, chosen)), list(compress(everything, (not each for each in chosen))))


def mean_loss(nats: Sequence[float], tokens: Sequence[int], records: Sequence[int]) -> float:
    """The loss of some records in nats per token, from the summed losses and tokens of all."""
    chosen = list(records)
    return float(np.asarray(nats)[chosen].sum() / np.asarray(tokens)[chosen].sum())


def figures(nats: Sequence[float], tokens: Sequence[int], split: Halves, *, seed: int) -> Figures:
    """The figures of an adapter, from its summed losses by record."""
    judged, weights = np.asarray(nats)[split.judging], np.asarray(tokens)[split.judging]
    return Figures(
        selection_loss=mean_loss(nats, tokens, split.selection),
        judging_loss=mean_loss(nats, tokens, split.judging),
        judging_ci95=bootstrap_ci95(judged, weights, resamples=RESAMPLES, seed=seed),
    )


def judge(combined: RecordLosses, best: RecordLosses, split: Halves, *, best_name: str, seed: int) -> Verdict:
    """Compare a combination with the best member, record by record of the judging half.

    It is published if its mean loss is lower; where that may be chance, because the interval of the difference holds
    zero or there are too few records for one, that is told.

    Args:
        combined: the combination's losses.
        best: those of the member that was best on the selection half, on the same records.
        split: of the records.
        best_name: of that member, for a person.
        seed: of the bootstrap.
    """
    tokens = np.asarray(best.tokens)[split.judging]
    difference = (np.asarray(combined.nats) - np.asarray(best.nats))[split.judging]
    delta = float(difference.sum() / tokens.sum())
    low, high = bootstrap_ci95(difference, tokens, resamples=RESAMPLES, seed=seed)
    within_noise = low <= 0 <= high or len(tokens) < LEAST_RECORDS
    if delta < 0:
        what = "better, within the noise" if within_noise else "better"
    else:
        what = "no better" if within_noise else "worse"
    return Verdict(
        published=delta < 0,
        reason=f"against the best member, {best_name}, the combination is {what}: {delta:+.4f} nats per token "
        f"({low:+.4f} to {high:+.4f}) on {len(tokens)} records",
        delta=delta,
        delta_ci95=(low, high),
        better_records=int((difference < 0).sum()),
    )
