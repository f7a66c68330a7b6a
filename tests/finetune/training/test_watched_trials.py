"""A trial of a search is looked at while it trains: that must change nothing, and may end it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.adapter_files import adapter_hash
from finetune.errors import ConfigurationError
from finetune.progress import ProgressEvent, ignore_progress
from finetune.search.heldout import HeldOutLoss
from finetune.search.watch import TrialStopped, Watch
from finetune.training.models import TrainingRequest
from finetune.training.sft import train_adapter

MakeRequest = Callable[..., TrainingRequest]


def watch_of(request: TrainingRequest, report: Callable[[int, float], bool]) -> Watch:
    held_out = request.dataset.eval_path
    records = [{"instruction": f"What is the answer number {i}?", "output": f"It is {i}."} for i in range(30, 34)]
    held_out.write_text("".join(json.dumps(record) + "\n" for record in records))
    watch = Watch(
        tell=ignore_progress, report=report, spend=lambda used: 1.0, used_before=0.0, allowed=1.0, interval=10.0
    )
    watch.held_out_loss = HeldOutLoss(held_out, request.base_model.path, max_length=128)
    return watch


def test_measuring_at_rungs_leaves_the_adapter_as_it_was_to_the_bit(make_request: MakeRequest) -> None:
    told: list[tuple[int, float]] = []
    # Dropout, so that a number that measuring drew would show.
    plain = make_request(place="plain", lora_dropout=0.1)
    watched = make_request(place="watched", lora_dropout=0.1)
    train_adapter(plain)

    def report(ninths: int, loss: float) -> bool:
        told.append((ninths, loss))
        return False

    result = train_adapter(watched, on_progress=watch_of(watched, report))
    assert result.training_steps == 9
    assert [ninths for ninths, _ in told] == [1, 3]
    assert 0 < told[1][1] < told[0][1], "it learns"
    assert adapter_hash(watched.adapter_dir) == adapter_hash(plain.adapter_dir)


def test_a_trial_that_is_pruned_ends_at_its_rung_and_publishes_nothing(make_request: MakeRequest) -> None:
    request = make_request()
    with pytest.raises(TrialStopped, match="pruned"):
        train_adapter(request, on_progress=watch_of(request, lambda ninths, loss: ninths == 3))
    assert len((request.work_dir / "training_log.jsonl").read_text().splitlines()) == 3
    assert not request.adapter_dir.exists()


def test_a_training_that_cannot_be_measured_is_refused(tmp_path: Path, make_request: MakeRequest) -> None:
    watch = watch_of(make_request(), lambda ninths, loss: False)
    watch(ProgressEvent("training", 1, 9, "steps"))
    with pytest.raises(ConfigurationError, match="train in one process, on one GPU"):
        watch(ProgressEvent("training", 2, 9, "steps"))
