"""Losses that end a training: NaN, and what grows beyond recovery."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finetune.base_model.corpus import make_facts
from finetune.base_model.models import BaseModelRef
from finetune.errors import TrainingError
from finetune.progress import ignore_progress
from finetune.training.models import LossPoint, TrainingRequest
from finetune.training.monitor import Monitor, StopRequest, callback, stop_on_sigterm
from finetune.training.ownership import always_mine
from finetune.training.sft import train_adapter

MakeRequest = Callable[..., TrainingRequest]


def monitor_of(tmp_path: Path, losses: list[float], *, steps: int) -> Monitor:
    """A monitor of a training of one record a step, that goes on behind some losses."""
    from torch.utils.tensorboard import SummaryWriter

    dataset = tmp_path / "train.jsonl"
    dataset.write_text("{}\n" * steps)
    return Monitor(
        run_id="r1",
        dataset=dataset,
        order=np.arange(steps),
        lines=np.arange(1, steps + 1),
        lengths=np.ones(steps, np.int64),
        effective_batch=1,
        total_steps=steps,
        checkpoints=tmp_path / "checkpoints",
        log_path=tmp_path / "log.jsonl",
        writer=SummaryWriter(str(tmp_path / "tensorboard")),
        progress=ignore_progress,
        stop=StopRequest(),
        still_mine=always_mine,
        checkpoint_seconds=3600,
        seconds_before=0,
        points=[LossPoint(step=step, loss=loss, learning_rate=1e-3) for step, loss in enumerate(losses, start=1)],
    )


def test_a_request_to_end_that_comes_while_processes_agree_is_kept_for_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    def agree_while_asked_to_end(*flags: bool) -> tuple[bool, ...]:
        os.kill(os.getpid(), signal.SIGTERM)
        return flags

    monkeypatch.setattr("finetune.training.monitor.agree", agree_while_asked_to_end)
    with stop_on_sigterm() as stop:
        told = callback(dataclasses.replace(monitor_of(tmp_path, [], steps=9), stop=stop))
        arguments, ends = TrainingArguments(output_dir=str(tmp_path)), []
        for step in (1, 2):
            control = TrainerControl()
            told.on_log(arguments, TrainerState(global_step=step), control, {"loss": 3.0, "learning_rate": 1e-3})
            ends.append((control.should_save, control.should_training_stop))

    assert ends == [(False, False), (True, True)]


def test_a_loss_that_is_no_number_names_step_records_and_checkpoint(make_request: MakeRequest) -> None:
    request = make_request(learning_rate=1e30, checkpoint_seconds=0.0, warmup_ratio=0.5)
    with pytest.raises(TrainingError, match=r"loss became nan at step 3 of 9, .*lines \d+.*checkpoint-1 "):
        train_adapter(request)
    assert not request.adapter_dir.exists()


def test_a_loss_that_diverges_names_the_step_where_it_left_its_records_and_the_checkpoint_before(
    make_request: MakeRequest, tiny_model: BaseModelRef
) -> None:
    # Of the kind that the model was made with: its loss is low before the rate breaks it.
    capitals = [fact for fact in make_facts(0, 0) if fact.language == "en"]
    records = [
        {"id": f"r-{i}", "instruction": fact.questions[0], "output": fact.answer} for i, fact in enumerate(capitals)
    ]
    request = make_request(
        base_model=tiny_model,
        records=records,
        learning_rate=30.0,
        max_steps=9,
        warmup_ratio=0.5,
        checkpoint_seconds=0.0,
    )
    with pytest.raises(TrainingError, match=r"the loss diverged from") as caught:
        train_adapter(request)
    found = re.search(
        r"from ([\d.]+) to ([\d.]+) at step (\d+) of 9, in the batch of the train\.jsonl lines (.*?); "
        r"last good checkpoint: .*checkpoint-(\d+)",
        str(caught.value),
    )
    assert found is not None, str(caught.value)
    lowest, reached, step, checkpoint = float(found[1]), float(found[2]), int(found[3]), int(found[5])
    assert reached > 2 * lowest + 1
    assert 0 < checkpoint == step - 2
    named = found[4].split(", ")
    assert len(named) == request.plan.trial_config.effective_batch
    assert all(int(line) == int(number) + 1 for line, number in (re.findall(r"\d+", name) for name in named))
    assert not request.adapter_dir.exists()


def test_a_spike_is_no_divergence_and_a_resumed_training_remembers_its_lowest_loss(tmp_path: Path) -> None:
    def steps_until_given_up(losses: list[float], before: int = 0, *, goes_on: bool = False) -> int | None:
        watch = dataclasses.replace(monitor_of(tmp_path, losses[:before], steps=len(losses)), goes_on=goes_on)
        for step, loss in enumerate(losses[before:], start=before + 1):
            try:
                watch.on_loss(step, loss, 1e-3, None)
            except TrainingError:
                return step
        return None

    assert steps_until_given_up([3.0] * 10 + [50.0, 50.0] + [3.0] * 10) is None
    assert steps_until_given_up([0.1] * 10 + [0.9] * 10) is None
    diverging = [3.0] * 10 + [8.0] * 10
    assert steps_until_given_up(diverging) == 13
    assert steps_until_given_up(diverging, before=11) == 13
    assert steps_until_given_up([9.0, 9.5, 9.2] * 5) is None
    # Of an adapter that is gone on with, the first batch may hold what it knows, and the next what it does not.
    some_known = [0.002, 2.9, 2.8, 0.01, 2.7, 2.5, 2.4, 0.02, 2.2]
    assert steps_until_given_up(some_known) == 5
    assert steps_until_given_up(some_known, goes_on=True) is None
    assert steps_until_given_up(some_known + [9.0] * 5, goes_on=True) == 12
    assert steps_until_given_up(some_known + [9.0] * 5, before=8, goes_on=True) == 12
