"""The decision between champion and challenger."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ArtifactError
from finetune.evaluation.models import ChampionComparison, EvalReport, FailedRegression
from finetune.registry.champion import decide
from finetune.registry.models import RegisteredVersion


def report(**changes: Any) -> EvalReport:
    values: dict[str, Any] = {
        "path": Path("/evaluation"),
        "run_id": "run-2",
        "eval_loss": 1.0,
        "eval_perplexity": 2.7,
        "base_loss": 3.0,
        "base_perplexity": 20.1,
        "delta_vs_base_loss": -2.0,
        "delta_ci95": (-2.2, -1.8),
        "token_accuracy": 0.8,
        "base_token_accuracy": 0.3,
        "exact_match": None,
        "base_exact_match": None,
        "records": 100,
        "tokens": 1000,
        "seconds": 1.0,
        "answers": [],
        "base_fingerprint": "base-0",
        "adapter_hash": "candidate",
    }
    return EvalReport(**(values | changes))


def against(low: float, high: float, adapter_hash: str = "old", **changes: Any) -> ChampionComparison:
    return ChampionComparison(
        version="v3",
        adapter_hash=adapter_hash,
        champion_loss=1.5,
        delta_vs_champion=(low + high) / 2,
        delta_ci95=(low, high),
        **changes,
    )


def reigning(adapter_hash: str = "old", base: str = "base-0") -> RegisteredVersion:
    return RegisteredVersion(
        version="v3",
        adapter_hash=adapter_hash,
        stored_path=Path("/registry/v3"),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        run_id="run-1",
        trial_id="trial-1",
        metrics={},
        tags={},
        lineage={"base_model_fingerprint": base},
        status="champion",
        reason="first",
    )


def test_the_first_adapter_that_beats_the_base_reigns() -> None:
    decision = decide(report(), None, adapter_hash="candidate")
    assert decision.champion
    assert decision.against is None
    assert "loss 3.0000 -> 1.0000" in decision.reason
    assert "-2.2000 to -1.8000" in decision.reason


@pytest.mark.parametrize("interval", [(-0.2, 0.1), (0.1, 0.4), (0.0, 0.0)])
def test_an_adapter_not_shown_to_beat_the_base_stays_challenger(interval: tuple[float, float]) -> None:
    decision = decide(report(delta_ci95=interval), None, adapter_hash="candidate")
    assert not decision.champion
    assert "not shown to be better than the base model" in decision.reason


def test_a_candidate_that_beats_the_champion_takes_its_place() -> None:
    decision = decide(report(champion=against(-0.6, -0.4)), reigning(), adapter_hash="candidate")
    assert decision.champion
    assert decision.against == "v3"
    assert "better than the champion v3: loss 1.5000 -> 1.0000" in decision.reason


def test_a_candidate_that_may_be_no_better_than_the_champion_stays_challenger() -> None:
    decision = decide(report(champion=against(-0.6, 0.1)), reigning(), adapter_hash="candidate")
    assert not decision.champion
    assert "not shown to be better than the champion v3" in decision.reason


def test_the_reason_says_how_many_records_the_champion_knew() -> None:
    """And the loss that it names is that on the others."""
    for rival, reigns in ((against(-0.7, -0.5, left_out=40), True), (against(-0.7, 0.1, left_out=40), False)):
        decision = decide(report(champion=rival), reigning(), adapter_hash="candidate")
        assert decision.champion is reigns
        assert f"loss 1.5000 -> {1.5 + (rival.delta_vs_champion or 0):.4f}" in decision.reason
        assert (
            "; left out of the comparison: 40 of the held-out records, on whose prompts v3 or a version that"
            in decision.reason
        )


@pytest.mark.parametrize(("left_out", "reigns"), [(94, True), (95, False), (100, False)])
def test_a_champion_that_knew_all_but_a_handful_of_records_is_left_to_a_person(left_out: int, reigns: bool) -> None:
    rival = against(-0.6, -0.4, left_out=left_out)
    if left_out == 100:
        rival = ChampionComparison(version="v3", adapter_hash="old", left_out=left_out)
    decision = decide(report(champion=rival), reigning(), adapter_hash="candidate")
    assert decision.champion is reigns
    told = f"only {100 - left_out} held-out records are left to compare it with the champion v3, and it takes 6"
    assert reigns or told in decision.reason
    assert f"left out of the comparison: {left_out} of the held-out records" in decision.reason


def test_what_nobody_can_tell_of_the_champion_changes_no_decision_but_is_told() -> None:
    rival = against(-0.6, -0.4, unknown=["v3", "v1"])
    decision = decide(report(champion=rival), reigning(), adapter_hash="candidate")
    assert decision.champion
    assert "nobody can tell" in decision.reason
    assert "the dataset of v3, v1 is gone or damaged" in decision.reason


def test_the_champion_itself_stays_champion_whatever_the_report_says() -> None:
    assert decide(report(delta_ci95=(-1, 1)), reigning("candidate"), adapter_hash="candidate").champion


def test_a_champion_on_another_base_model_is_left_to_a_person() -> None:
    decision = decide(report(), reigning(base="base-1"), adapter_hash="candidate")
    assert not decision.champion
    assert "another base model" in decision.reason


@pytest.mark.parametrize("comparison", [None, against(-0.6, -0.4, adapter_hash="older")])
def test_a_report_made_against_an_earlier_champion_does_not_count(comparison: ChampionComparison | None) -> None:
    decision = decide(report(champion=comparison), reigning(), adapter_hash="candidate")
    assert not decision.champion
    assert "evaluate it again" in decision.reason


@pytest.mark.parametrize(("records", "reigns"), [(1, False), (5, False), (6, True)])
def test_a_handful_of_records_makes_no_champion(records: int, reigns: bool) -> None:
    decision = decide(report(records=records), None, adapter_hash="candidate")
    assert decision.champion is reigns
    assert reigns or f"only {records} held-out records" in decision.reason


def test_a_report_of_another_adapter_is_an_error() -> None:
    with pytest.raises(ArtifactError, match="not of other"):
        decide(report(), None, adapter_hash="other")


def test_a_candidate_that_fails_a_regression_prompt_stays_challenger() -> None:
    failed = FailedRegression(id="politeness", prompt="Hi", answer="Go away", why="contains 'go away'")
    decision = decide(
        report(champion=against(-0.6, -0.4), regressions=4, failed_regressions=[failed]),
        reigning(),
        adapter_hash="candidate",
    )
    assert not decision.champion
    assert "fails 1 of 4 regression prompts, such as politeness (contains 'go away')" in decision.reason


@pytest.mark.parametrize("rival", [None, against(-0.5, -0.0004)], ids=["base", "champion"])
def test_a_gain_too_small_to_be_of_use_makes_no_champion(rival: ChampionComparison | None) -> None:
    # What an adapter that learned nothing shows: a difference that is real, and a ten-thousandth of a nat.
    evaluated = report(champion=rival) if rival else report(delta_ci95=(-0.0006, -0.0004))
    reigns = reigning() if rival else None
    refused = decide(evaluated, reigns, adapter_hash="candidate", min_gain=0.001)
    assert not refused.champion
    assert "not shown to be better by at least 0.001 nats per token than the" in refused.reason
    assert decide(evaluated, reigns, adapter_hash="candidate", min_gain=0.0004).champion
