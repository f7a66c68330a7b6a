"""Intervals and text scores."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.evaluation.statistics import bootstrap_ci95, chrf, exact_match


def test_the_interval_agrees_with_the_normal_approximation_where_that_holds() -> None:
    generator = np.random.default_rng(7)
    tokens = np.full(400, 10)
    differences = generator.normal(loc=-5, scale=2, size=400)
    low, high = bootstrap_ci95(differences, tokens, resamples=4000, seed=1)
    means = differences / tokens
    error = means.std(ddof=1) / np.sqrt(len(means))
    assert low == pytest.approx(means.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(means.mean() + 1.96 * error, abs=0.15 * error)


@pytest.mark.parametrize("records", [6, 12, 80])
def test_the_interval_covers_the_truth_as_often_as_it_says_also_for_few_records(records: int) -> None:
    generator = np.random.default_rng(3)
    covered, trials = 0, 400
    for trial in range(trials):
        tokens = np.maximum(1, generator.lognormal(3.5, 0.7, size=records)).astype(np.int64)
        differences = generator.normal(loc=-0.5 * tokens, scale=np.sqrt(tokens))
        low, high = bootstrap_ci95(differences, tokens, resamples=500, seed=trial)
        covered += low <= -0.5 <= high
    # (Within three standard errors of 95 %; plain percentiles cover 85 % with six records.)
    assert 0.917 * trials <= covered <= 0.983 * trials


def test_long_records_weigh_as_many_tokens_as_they_have() -> None:
    low, high = bootstrap_ci95(np.array([-100.0, 1.0]), np.array([100, 1]), resamples=500, seed=0)
    assert (low, high) == (-1, 1)


def test_the_interval_of_many_records_is_drawn_in_blocks_that_do_not_change_it() -> None:
    differences, tokens = np.linspace(-1, 0, 3000), np.ones(3000, dtype=np.int64)
    low, high = bootstrap_ci95(differences, tokens, resamples=2000, seed=5)
    assert bootstrap_ci95(differences, tokens, resamples=2000, seed=5) == (low, high)
    assert -0.52 < low < -0.5 < high < -0.48


# Computed with sacrebleu 2.6.0, corpus_chrf with its defaults.
@pytest.mark.parametrize(
    ("answers", "references", "score"),
    [
        (["The cat sat."], ["The cat sat."], 100.0),
        (["abc"], ["xyz"], 0.0),
        ([""], ["xyz"], 0.0),
        (["the cat sat on the mat"], ["a cat sat on a mat"], 55.11170308673565),
        (["видра живе біля річки", "seven"], ["Видра живе у норі біля річки.", "Seven."], 56.10257719053673),
    ],
)
def test_chrf_equals_that_of_sacrebleu(answers: list[str], references: list[str], score: float) -> None:
    assert chrf(answers, references) == pytest.approx(score, abs=1e-9)


def test_exact_match_ignores_case_white_space_and_a_last_full_stop() -> None:
    assert exact_match(["  the Cat\nsat ", "no"], ["The cat sat.", "yes"]) == 0.5
