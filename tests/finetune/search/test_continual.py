"""What is said of losses on old and new data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from finetune.errors import ConfigurationError, DatasetError
from finetune.search.continual.comparison import (
    Arm,
    ArmName,
    ContinualResult,
    ContinualSpec,
    Losses,
    concluded,
    measured,
)
from finetune.search.spec import spec_of

# Six old records and six new ones, of ten tokens each.
OLD = np.arange(12) < 6
NAMES: tuple[ArmName, ...] = ("base model", "champion", "continued", "continued without replay", "from scratch")
ARMS = [Arm(name=name, run_id=None if name == "base model" else name) for name in NAMES]


def losses(old: dict[ArmName, float], new: dict[ArmName, float], held: npt.NDArray[np.bool_] = OLD) -> Losses:
    """Losses of so many nats per token; each model's differ a little from record to record."""
    wobble = np.linspace(-0.01, 0.01, len(held))
    nats = {name: 10 * (np.where(held, old[name], new[name]) + wobble * place) for place, name in enumerate(NAMES)}
    return Losses(tokens=np.full(len(held), 10), old=held, nats=nats)


def result_of(found: Losses) -> ContinualResult:
    arms, changes = measured(ARMS, found, seed=1)
    tokens = {"continued": 250, "from scratch": 1000}
    result = ContinualResult(
        status="completed",
        name="continual-1",
        spec=ContinualSpec(),
        date="2026-06-02",
        version="v3",
        known_date="2026-06-01",
        dataset_fingerprint="d",
        base_model="m",
        base_fingerprint="b",
        trained_new=3,
        trained_replayed=1,
        arms=[arm.model_copy(update={"tokens": tokens.get(arm.name)}) for arm in arms],
        changes=changes,
        conclusion="",
    )
    return result.model_copy(update={"conclusion": concluded(result)})


def by_name(*values: float) -> dict[ArmName, float]:
    return dict(zip(NAMES, values, strict=True))


def test_forgetting_is_the_rise_on_old_data_and_the_conclusion_says_all_with_numbers() -> None:
    result = result_of(losses(old=by_name(3.0, 1.0, 1.3, 2.0, 1.1), new=by_name(3.0, 2.5, 1.0, 1.0, 1.0)))
    assert result.forgetting is not None
    assert result.forgetting.change == pytest.approx(0.3, abs=0.01)
    assert result.forgetting.run_ids == ("continued", "champion")
    continued = result.arm("continued")
    assert continued is not None
    assert continued.loss == pytest.approx({"old": 1.3, "new": 1.0}, abs=0.02)
    told = result.conclusion
    assert "Going on from v3 raises the loss on old data (+0.29" in told
    assert "and lowers the loss on new data (-1.4" in told
    assert "Replay lowers the loss on old data (-0.69" in told
    assert "Against training from scratch, going on raises the loss on old data" in told
    assert told.endswith("It took 25% of the training tokens from scratch.")


def test_a_difference_within_the_noise_is_not_called_one() -> None:
    same = by_name(3.0, 1.0, 1.0, 1.0, 1.0)
    found = losses(old=same, new=same)
    swing = 3.0 * (-1.0) ** np.arange(len(OLD))
    noisy = {name: nats + place * swing for place, (name, nats) in enumerate(found.nats.items())}
    result = result_of(Losses(tokens=found.tokens, old=found.old, nats=noisy))
    assert result.forgetting is not None
    assert not result.forgetting.shown
    assert "Going on from v3 is not shown to change the loss on old data" in result.conclusion


def test_of_a_handful_of_records_nothing_is_shown() -> None:
    few = np.arange(8) < 5
    result = result_of(losses(by_name(3.0, 1.0, 2.0, 2.0, 1.0), by_name(3.0, 2.0, 1.0, 1.0, 1.0), few))
    assert result.forgetting is not None
    assert result.forgetting.ci95[0] > 0
    assert not result.forgetting.shown


@pytest.mark.parametrize(("held", "which"), [(np.ones(12, bool), "new"), (np.zeros(12, bool), "old")])
def test_where_nothing_old_or_nothing_new_is_held_out_nothing_is_said(held: npt.NDArray[np.bool_], which: str) -> None:
    same = by_name(3.0, 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(DatasetError, match=f"none of the 12 held-out records is {which}"):
        measured(ARMS, losses(same, same, held), seed=1)


def test_a_comparison_without_one_of_the_models_is_left_out() -> None:
    same = by_name(3.0, 1.0, 1.2, 1.5, 1.0)
    arms = [arm for arm in ARMS if arm.name != "continued without replay"]
    _, changes = measured(arms, losses(same, same), seed=1)
    assert {(change.arm, change.against) for change in changes} == {
        ("continued", "champion"),
        ("continued", "from scratch"),
    }


def test_a_specification_is_of_dates_of_the_loop() -> None:
    def read(**content: object) -> ContinualSpec:
        return spec_of(content, ContinualSpec, where=Path("spec.yaml"))

    spec = read(dataset_date="2026-06-02", replay_fraction=0.1)
    assert spec.identity("d") != read(dataset_date="2026-06-02").identity("d")
    # What is said of it, and where its data lie, change nothing.
    assert spec.identity("d") == read(replay_fraction=0.1, goal="another").identity("d")
    for wrong, why in (
        ({"dataset_path": "a.jsonl"}, "name a dataset_date, not a dataset_path"),
        ({"replay_fraction": 1.0}, "replay_fraction: Input should be less than 1"),
        ({"version": "3"}, "version: String should match pattern"),
        ({"replay": 0.1}, "replay: Extra inputs are not permitted"),
    ):
        with pytest.raises(ConfigurationError, match=why):
            read(**wrong)
