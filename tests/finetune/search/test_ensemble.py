"""The weights of an ensemble's members, its halves and folds, and its verdict: plain functions."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

from finetune.dataset.discovery import discover_exports
from finetune.dataset.folds import without_fold
from finetune.dataset.models import PreparedDataset
from finetune.dataset.prepare import prepare_dataset
from finetune.errors import ConfigurationError, DatasetError
from finetune.evaluation.losses import RecordLosses
from finetune.layout import DataLayout
from finetune.publishing import sha256_file
from finetune.search.ensemble.judging import Halves, figures, halves, judge
from finetune.search.ensemble.mixing import peft_weights
from finetune.search.ensemble.spec import (
    EnsembleSpec,
    Weighting,
    greedy_soup,
    loss_weights,
    soup_weights,
)
from finetune.search.spec import spec_of

FORMULAS: list[Weighting] = ["uniform", "inverse_loss", "softmax_loss"]
NAN, INF = math.nan, math.inf


def test_weights_follow_their_formulas() -> None:
    losses = [1.0, 2.0, 4.0]
    assert loss_weights(losses, "uniform", temperature=1) == pytest.approx([1 / 3] * 3)
    assert loss_weights(losses, "inverse_loss", temperature=1) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    parts = [math.exp(-loss / 0.5) for loss in losses]
    assert loss_weights(losses, "softmax_loss", temperature=0.5) == pytest.approx([part / sum(parts) for part in parts])


@pytest.mark.parametrize("weighting", FORMULAS)
def test_equal_losses_give_equal_weights_and_a_loss_that_is_no_number_none(weighting: Weighting) -> None:
    assert loss_weights([2.5] * 4, weighting, temperature=0.05) == pytest.approx([0.25] * 4)
    diverged = loss_weights([2.5, NAN, 2.5, INF], weighting, temperature=0.05)
    assert diverged == pytest.approx([0.5, 0.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="no member"):
        loss_weights([NAN, INF], weighting, temperature=0.05)


def test_extreme_losses_overflow_nothing() -> None:
    for losses in ([0.0, 1.0], [1e300, 1.0], [1e-300, 1e-300]):
        for weighting in FORMULAS:
            weights = loss_weights(losses, weighting, temperature=1e-6)
            assert sum(weights) == pytest.approx(1)
            assert all(math.isfinite(weight) for weight in weights)
    # Exactly: a share that is lost in rounding would pass one member off as a combination.
    assert loss_weights([0.7, 0.1, 0.7], "softmax_loss", temperature=0.02) == [0.0, 1.0, 0.0]


def test_a_greedy_soup_keeps_what_does_not_make_it_worse() -> None:
    tried: list[list[int]] = []
    results = {(2, 0): 0.9, (2, 0, 3): 0.95, (2, 0, 1): 0.9}

    def loss_of(soup: Sequence[int]) -> float:
        tried.append(list(soup))
        return results[tuple(soup)]

    tastes = greedy_soup([1.1, 1.3, 1.0, 1.2], loss_of)
    assert tried == [[2, 0], [2, 0, 3], [2, 0, 1]], "members by their loss, each with the soup so far"
    assert [(taste.member, taste.kept) for taste in tastes] == [(2, True), (0, True), (3, False), (1, True)]
    assert soup_weights(tastes, 4) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


def test_a_greedy_soup_leaves_out_what_gives_no_number() -> None:
    tastes = greedy_soup([1.0, NAN, 1.1], lambda soup: NAN)
    assert [(taste.member, taste.loss, taste.kept) for taste in tastes] == [(0, 1.0, True), (2, None, False)]
    assert soup_weights(tastes, 3) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="no member"):
        greedy_soup([NAN, INF], lambda soup: 0.0)


def test_what_peft_is_given_makes_every_combination_a_mean() -> None:
    assert peft_weights([0.25, 0.75], "cat") == [0.25, 0.75]
    assert peft_weights([0.25, 0.75], "dare_linear_svd") == [0.25, 0.75]
    assert peft_weights([0.25, 0.75], "linear") == [0.0625, 0.5625]
    assert peft_weights([0.25, 0.75], "ties_svd") == [0.5, 1.5]
    assert peft_weights([0.25, 0.75], "ties") == [0.25, 2.25]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"diversity": "ranks"}, "two or more different ranks"),
        ({"diversity": "ranks", "ranks": [4, 4]}, "two or more different ranks"),
        ({"diversity": "ranks", "ranks": [4, 8], "n_members": 3}, "there are 2 ranks"),
        ({"diversity": "ranks", "ranks": [4, 8], "combination": "ties"}, "needs members of one rank"),
        ({"diversity": "ranks", "ranks": [4, 8], "fixed": {"lora_rank": 4}}, "both fixed"),
        ({"ranks": [4, 8]}, "ranks is for diversity ranks"),
        ({"fixed": {"seed": 1}}, "fixed.seed"),
        ({"fixed": {"use_dora": True}}, "magnitudes"),
        ({"temperature": 0.1}, "softmax_loss"),
        ({"density": 0.3}, "cat keeps all"),
        ({"combination": "ties", "svd_rank": 4}, "ends in svd"),
        ({"combination": "ties", "density": 1.5}, "density"),
        ({"n_members": 1}, "n_members"),
        ({"weighting": "best"}, "weighting"),
        ({"method": "prefix"}, "method"),
    ],
)
def test_a_specification_that_contradicts_itself_is_refused(content: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        spec_of(content, EnsembleSpec, where="here")


def test_members_differ_in_what_was_asked_for() -> None:
    seeds = EnsembleSpec(n_members=2, seed=7).members
    assert [member.params for member in seeds] == [{"seed": 7}, {"seed": 8}]
    ranks = EnsembleSpec(diversity="ranks", ranks=[4, 16]).members
    assert [member.params for member in ranks] == [{"seed": 42, "lora_rank": 4}, {"seed": 42, "lora_rank": 16}]
    folds = EnsembleSpec(diversity="folds", n_members=3).members
    assert [(member.params["seed"], member.fold) for member in folds] == [(42, 0), (42, 1), (42, 2)]


def test_an_ensembles_name_tells_what_is_combined_and_not_why() -> None:
    spec = EnsembleSpec(goal="one")
    assert spec.name("data", "base") == EnsembleSpec(goal="two", dry_run=True).name("data", "base")
    assert spec.name("data", "base") == EnsembleSpec(n_members=4, tokens_per_second=60).name("data", "base")
    ties = {"weighting": "softmax_loss", "combination": "ties"}
    written = EnsembleSpec.model_validate({**ties, "temperature": 0.05, "density": 0.5})
    assert written.name("data", "base") == EnsembleSpec.model_validate(ties).name("data", "base")
    changes = [{"weighting": "uniform"}, {"combination": "svd"}, {"seed": 1}, {"n_members": 5}]
    changes += [ties, {**ties, "density": 0.4}, {**ties, "temperature": 0.1}, {"diversity": "ranks", "ranks": [2, 4]}]
    others = [EnsembleSpec.model_validate(each) for each in changes]
    assert len({each.name("data", "base") for each in [spec, *others]} | {spec.name("data", "other")}) == 10


def test_halves_are_decided_by_content(tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": f"Question {i}?", "output": "Yes."}) for i in range(11)]
    shuffled = random.Random(0).sample(lines, len(lines))
    found = []
    for order in (lines, shuffled):
        path = tmp_path / "eval.jsonl"
        path.write_text("".join(line + "\n" for line in order))
        split = halves(path, range(1, 12))
        assert sorted(split.selection + split.judging) == list(range(11))
        assert (len(split.selection), len(split.judging)) == (5, 6)
        found.append({order[index] for index in split.judging})
    assert found[0] == found[1]
    # Lines that were not scored count for neither, and indices are among those that were.
    some = halves(path, [2, 4, 6, 8, 10])
    assert sorted(some.selection + some.judging) == list(range(5))
    with pytest.raises(DatasetError, match="3 held-out records are too few"):
        halves(path, [1, 2, 3])


def losses(nats: list[float]) -> RecordLosses:
    count = len(nats)
    return RecordLosses(lines=list(range(1, count + 1)), tokens=[10] * count, base_nats=[30.0] * count, nats=nats)


def test_figures_are_of_each_half() -> None:
    split = Halves(selection=[0, 1], judging=[2, 3])
    found = figures([10.0, 20.0, 30.0, 40.0], [10, 10, 20, 20], split, seed=1)
    assert (found.selection_loss, found.judging_loss) == (1.5, 1.75)
    assert found.judging_ci95 == (1.5, 2.0)


def test_a_combination_is_published_only_if_it_is_better_on_the_judging_half() -> None:
    split = Halves(selection=list(range(40)), judging=list(range(40, 80)))
    drawn = random.Random(1)
    noise = [drawn.gauss(0, 1) for _ in range(40)]
    mean = sum(noise) / 40
    best = losses([20.0] * 80)

    def judged(change: list[float]) -> tuple[bool, str]:
        # On the selection half it is far better, which must not count.
        found = judge(losses([1.0] * 40 + [20.0 + each for each in change]), best, split, best_name="seed 1", seed=1)
        assert found.delta == pytest.approx(sum(change) / 400)
        assert found.better_records == sum(each < 0 for each in change)
        return found.published, found.reason

    published, reason = judged([each - mean - 2 for each in noise])
    assert published
    assert "is better: -0.2000" in reason
    published, reason = judged([each - mean + 2 for each in noise])
    assert not published
    assert "is worse: +0.2000" in reason
    published, reason = judged([each - mean - 0.01 for each in noise])
    assert published
    assert "better, within the noise" in reason
    published, reason = judged([each - mean + 0.01 for each in noise])
    assert not published
    assert "no better" in reason
    assert judged([0.0] * 40)[0] is False


def test_of_a_handful_of_records_no_difference_is_beyond_the_noise() -> None:
    for judging, what in ((5, "better, within the noise"), (6, "better")):
        split = Halves(selection=[0], judging=list(range(1, judging + 1)))
        count = judging + 1
        found = judge(losses([19.0] * count), losses([20.0] * count), split, best_name="seed 1", seed=1)
        assert found.delta_ci95 == (-0.1, -0.1)
        assert f"the combination is {what}:" in found.reason


def dataset_of(root: Path, count: int) -> tuple[PreparedDataset, DataLayout]:
    layout = DataLayout(root)
    layout.exports.mkdir(parents=True)
    lines = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(count)]
    (layout.exports / "brain_dataset_2026-06-01.jsonl").write_text("".join(lines))
    return prepare_dataset(discover_exports(layout.exports), date="2026-06-01", layout=layout), layout


def test_every_record_is_in_one_fold_and_every_member_learns_the_others(tmp_path: Path) -> None:
    whole, layout = dataset_of(tmp_path, 60)
    records = whole.train_path.read_text().splitlines()
    parts = [without_fold(whole, fold, 3, layout) for fold in range(3)]
    kept = [part.train_path.read_text().splitlines() for part in parts]
    left_out = [[record for record in records if record not in each] for each in kept]
    assert sorted(chain.from_iterable(left_out)) == sorted(records)
    assert [len(each) for each in kept] == [part.counts.train for part in parts]
    # In their order, and the held-out records are the same file.
    assert all(each == [record for record in records if record in each] for each in kept)
    assert {sha256_file(part.eval_path) for part in parts} == {sha256_file(whole.eval_path)}
    assert all(part.eval_path.samefile(whole.eval_path) for part in parts)
    again = without_fold(whole, 1, 3, layout)
    assert again.reused
    assert again.fingerprint == parts[1].fingerprint
    assert len({part.fingerprint for part in parts} | {whole.fingerprint}) == 4


def test_more_folds_than_records_are_refused(tmp_path: Path) -> None:
    whole, layout = dataset_of(tmp_path, 12)
    with pytest.raises(DatasetError, match=r"fold \d+ of 1000 holds no record"):
        _ = [without_fold(whole, fold, 1000, layout) for fold in range(1000)]
