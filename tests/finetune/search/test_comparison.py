"""Statistics against closed forms, published tables and examples, and against chance itself."""

import math

import numpy as np
import pytest

from finetune.search.ablation.comparison import holm, mean_ci95, paired_difference

# Hours of sleep that ten patients gained by one drug and another: Student, The Probable Error of a Mean, 1908.
DEXTRO = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
LAEVO = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_one_record_gives_students_paired_test() -> None:
    """What R prints for `t.test(extra ~ group, data = sleep, paired = TRUE)`."""
    found = paired_difference(np.array(LAEVO)[:, None], np.array(DEXTRO)[:, None], np.array([1]))
    assert found.mean == pytest.approx(1.58)
    assert found.degrees == 9
    assert found.p_value == pytest.approx(0.002833, abs=5e-7)
    assert found.ci95 == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    differences = [ours - theirs for ours, theirs in zip(LAEVO, DEXTRO, strict=True)]
    assert mean_ci95(differences) == pytest.approx(found.ci95)
    assert mean_ci95([1.0]) is None


def test_seeds_and_records_both_count_as_drawn() -> None:
    """By hand: mean squares 4 of seeds, 9 of records, 1 of what is left; the mean's variance is (4 + 9 - 1) / 4."""
    found = paired_difference(np.array([[1.0, 3.0], [2.0, 6.0]]), np.zeros((2, 2)), np.array([1, 1]))
    assert found.mean == 3
    assert found.degrees == 1
    assert found.p_value == pytest.approx(1 / 3)
    assert found.ci95 is not None
    assert found.ci95[1] - 3 == pytest.approx(math.sqrt(3) * 12.7062, rel=1e-5)


def test_a_difference_is_that_of_losses_per_token() -> None:
    drawn = np.random.default_rng(1)
    tokens = drawn.integers(1, 200, size=12)
    ours, theirs = (tokens * drawn.gamma(2, size=(3, 12)) for _ in range(2))
    found = paired_difference(ours, theirs, tokens)
    assert found.mean == pytest.approx(ours.sum() / (3 * tokens.sum()) - theirs.sum() / (3 * tokens.sum()))
    turned = paired_difference(theirs, ours, tokens)
    assert (turned.mean, turned.p_value) == (pytest.approx(-found.mean), pytest.approx(found.p_value))


@pytest.mark.parametrize(("of_seeds", "of_records"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize(("seeds", "records"), [(3, 20), (2, 60), (5, 6)])
def test_where_there_is_no_difference_one_is_told_as_often_as_it_may_be(
    of_seeds: float, of_records: float, seeds: int, records: int
) -> None:
    """Wherever the chance lies: a test over records alone is wrong most of the time when seeds differ."""
    drawn = np.random.default_rng(7)
    tokens = np.full(records, 10)
    told = records_alone = 0
    for _ in range(400):
        nats = (
            of_seeds * drawn.normal(size=(seeds, 1))
            + of_records * drawn.normal(size=(1, records))
            + 0.5 * drawn.normal(size=(seeds, records))
        )
        found = paired_difference(10 * nats, np.zeros_like(nats), tokens)
        told += found.p_value is not None and found.p_value < 0.05
        by_record = nats.mean(axis=0)
        records_alone += abs(by_record.mean()) > 2 * by_record.std(ddof=1) / math.sqrt(records)
    # 5 % of 400, and what chance may add to it in one of a hundred such tests
    assert told <= 20 + 10
    if of_seeds == 1 and records >= 20:
        assert records_alone > 160


def test_a_real_difference_is_found_and_one_lucky_seed_is_none() -> None:
    drawn = np.random.default_rng(3)
    tokens = drawn.integers(5, 50, size=40)
    noise = drawn.normal(scale=0.05, size=(3, 40))
    real = paired_difference(tokens * (noise - 0.3), np.zeros((3, 40)), tokens)
    assert real.p_value is not None
    assert real.p_value < 0.001
    assert real.ci95 is not None
    assert real.ci95[0] < -0.3 < real.ci95[1]
    lucky = paired_difference(tokens * (noise - np.array([[0.9], [0.0], [0.0]])), np.zeros((3, 40)), tokens)
    assert lucky.p_value is not None
    assert lucky.p_value > 0.3


def test_where_nothing_varies_there_is_nothing_to_test() -> None:
    nats = np.random.default_rng(0).gamma(2, size=(3, 5))
    tokens = np.full(5, 3)
    same = paired_difference(nats, nats, tokens)
    assert (same.mean, same.p_value, same.ci95) == (0, 1, (0, 0))
    shifted = paired_difference(np.full((3, 5), 0.9), np.full((3, 5), 0.3), tokens)
    assert shifted.mean == pytest.approx(0.2)
    assert (shifted.p_value, shifted.ci95) == (None, None)


def test_p_values_are_corrected_as_holm_says() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
