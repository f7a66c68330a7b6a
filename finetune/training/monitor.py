"""What watches a training step by step: progress, log, divergence, checkpoints, SIGTERM."""

from __future__ import annotations

import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import orjson

from finetune.errors import TrainingError
from finetune.progress import Progress, ProgressEvent
from finetune.training.checkpoints import newest_complete, seal_checkpoint
from finetune.training.data import Ints
from finetune.training.memory import peak_memory_gb
from finetune.training.models import LossPoint
from finetune.training.ownership import StillMine, refuse_if_taken_over
from finetune.training.ranks import agree, rank, wait_for_all

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainerControl, TrainerState

_REPORT_SECONDS = 2.0
# A step that ends so long after the last one's may end after a pause in which another process took over.
_ASK_SECONDS = 5.0
# A loss has diverged whose median over five steps is more than twice the lowest such median (or the first loss,
# the base model's own), plus one nat: a spike of two steps is none, nor is a small loss that doubles. Who goes on with
# an adapter knows some records and not others: there the highest of the first five losses stands for the lowest median.
_WINDOW = 5
_RISE_FACTOR, _RISE_NATS = 2.0, 1.0
_NAMED = 16


@runtime_checkable
class StepListener(Protocol):
    """A listener of progress that also looks at the model after every step of a training in one process.

    What it raises ends the training; what it does must leave the model and all random states as they were.
    """

    def __call__(self, event: ProgressEvent) -> None:
        """As of any listener."""

    def after_step(self, step: int, total_steps: int, model: Module) -> None:
        """An optimizer step was taken."""


@dataclass
class StopRequest:
    """Set when someone asked the process to end."""

    requested: bool = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Turn SIGTERM (spot preemption, a deleted pod) into a request that the training sees after its step."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread only.
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True

    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass
class Monitor:
    """The figures of a running training; its methods are called by `callback`.

    Args:
        run_id: the training's name.
        dataset: the JSON Lines file of the records.
        order: indices of records in the order in which they are trained.
        lines: line numbers of the records in the dataset.
        lengths: tokens of the records.
        effective_batch: records of one optimizer step.
        total_steps: optimizer steps of the whole training.
        checkpoints: where checkpoints go.
        log_path: the JSON Lines file that gets one line per step.
        writer: TensorBoard's.
        progress: who listens.
        stop: set when the process was asked to end.
        still_mine: asked before anything is written after a while, and before every checkpoint.
        checkpoint_seconds: time between checkpoints.
        seconds_before: training time of earlier attempts.
        points: the loss curve up to the checkpoint that the training goes on from.
        goes_on: whether the training began with an adapter.
    """

    run_id: str
    dataset: Path
    order: Ints
    lines: Ints
    lengths: Ints
    effective_batch: int
    total_steps: int
    checkpoints: Path
    log_path: Path
    writer: SummaryWriter
    progress: Progress
    stop: StopRequest
    still_mine: StillMine
    checkpoint_seconds: float
    seconds_before: float
    points: list[LossPoint] = field(default_factory=list)
    goes_on: bool = False

    def __post_init__(self) -> None:
        self._tokens = self.lengths[self.order].cumsum()
        self._first_step = len(self.points)
        self._lowest = min((self._median(end) for end in range(1, len(self.points) + 1)), default=math.inf)
        # Whether the last loss was so high that the training may be diverging.
        self.doubtful = False
        self._started = self._saved = self._reported = self._asked = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time of all attempts."""
        return self.seconds_before + time.monotonic() - self._started

    def tokens_at(self, step: int) -> int:
        """Tokens trained up to the end of a step, padding apart."""
        return int(self._tokens[min(step * self.effective_batch, len(self.order)) - 1]) if step else 0

    def lines_of(self, step: int) -> list[int]:
        """Line numbers in the dataset of the records that a step saw."""
        batch = self.order[(step - 1) * self.effective_batch : step * self.effective_batch]
        return [int(line) for line in self.lines[batch]]

    def on_begin(self) -> None:
        """The first step is about to start."""
        self._started = self._saved = time.monotonic()

    def on_step(self, step: int) -> bool:
        """After an optimizer step: whether a checkpoint is due.

        Raises:
            TransientError: another process has taken the training over.
        """
        now = time.monotonic()
        due = step < self.total_steps and (self.stop.requested or now - self._saved >= self.checkpoint_seconds)
        if due or now - self._asked >= _ASK_SECONDS:
            refuse_if_taken_over(self.still_mine, self.checkpoints)
            self._asked = time.monotonic()
        return due

    def on_checkpoint(self, directory: Path) -> None:
        """A checkpoint's files are written; they count from now on.

        Raises:
            TransientError: another process has taken the training over meanwhile.
        """
        refuse_if_taken_over(self.still_mine, directory)
        points = [point.model_dump() for point in self.points]
        seal_checkpoint(directory, {"run_id": self.run_id, "seconds": self.seconds, "points": points})
        self._saved = time.monotonic()

    def on_loss(self, step: int, loss: float, learning_rate: float, gradient_norm: float | None) -> None:
        """A step's loss is known.

        Raises:
            TrainingError: it is not a number, or the training has diverged.
        """
        if not math.isfinite(loss):
            self._give_up(step, f"the loss became {loss}")
        self.points.append(LossPoint(step=step, loss=loss, learning_rate=learning_rate))
        self._write(step, loss, learning_rate, gradient_norm)
        self._refuse_divergence()

    def _median(self, end: int) -> float:
        """The median loss of the five steps up to the `end`-th, or of as many as there are."""
        return statistics.median(point.loss for point in self.points[max(0, end - _WINDOW) : end])

    def _refuse_divergence(self) -> None:
        median = self._median(len(self.points))
        self._lowest = min(self._lowest, median)
        good = max(point.loss for point in self.points[:_WINDOW]) if self.goes_on else self._lowest
        limit = _RISE_FACTOR * good + _RISE_NATS
        self.doubtful = self.points[-1].loss > limit
        if median > limit and len(self.points) >= _WINDOW:
            left = next(point.step for point in self.points[-_WINDOW:] if point.loss > limit)
            self._give_up(left, f"the loss diverged from {good:.3g} to {median:.3g}")

    def _write(self, step: int, loss: float, learning_rate: float, gradient_norm: float | None) -> None:
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        done = step - self._first_step
        figures = {
            "loss": loss,
            "learning_rate": learning_rate,
            "tokens_per_second": (self.tokens_at(step) - self.tokens_at(self._first_step)) / elapsed,
            "eta_seconds": elapsed / done * (self.total_steps - step),
            "peak_memory_gb": peak_memory_gb(),
        }
        if gradient_norm is not None:
            figures["gradient_norm"] = gradient_norm
        for name, value in figures.items():
            self.writer.add_scalar(f"train/{name}", value, step)
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **figures, "tokens": self.tokens_at(step)}) + "\n")
        if done == 1 or step == self.total_steps or now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            self.progress(ProgressEvent("training", step, self.total_steps, "steps", figures))

    def _give_up(self, step: int, what: str) -> None:
        """End the training for what went wrong at a step.

        Raises:
            TrainingError: names the step, its records, and the newest checkpoint whose weights gave a good loss.
        """
        # The loss of a step is that of the weights that the step before it made.
        last = newest_complete(self.checkpoints, before=step - 1)
        lines = self.lines_of(step)
        shown = ", ".join(_with_ids(self.dataset, lines[:_NAMED])) + (", ..." if len(lines) > _NAMED else "")
        raise TrainingError(
            f"{what} at step {step} of {self.total_steps}, in the batch of the train.jsonl lines {shown}; "
            f"last good checkpoint: {last[0] if last else 'none'}",
            where=self.checkpoints,
            remedy="Look at these records, lower the learning rate, or plan with another precision",
        )


def _with_ids(dataset: Path, lines: list[int]) -> list[str]:
    """Line numbers, each with its record's id where it has one."""
    names = {}
    with dataset.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number in lines:
                record_id = orjson.loads(line).get("id")
                names[number] = str(number) if record_id is None else f"{number} (id {record_id})"
    return [names[number] for number in lines]


def callback(monitor: Monitor) -> Any:
    """A `transformers.TrainerCallback` that tells `monitor` what happens."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            monitor.on_begin()

        def on_log(
            self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **others: Any
        ) -> None:
            if "loss" not in logs:
                return
            save = False
            if rank() == 0:
                save = monitor.on_step(state.global_step)
                monitor.on_loss(state.global_step, logs["loss"], logs["learning_rate"], logs.get("grad_norm"))
                if isinstance(monitor.progress, StepListener):
                    monitor.progress.after_step(state.global_step, monitor.total_steps, others["model"])
                # Only the newest checkpoints are kept: one that may be bad would push out a good one.
                save &= not monitor.doubtful
            save, stopping = agree(save, monitor.stop.requested)
            if stopping:
                # (Never set to False: a request that comes while the processes agree is for the next step.)
                monitor.stop.requested = True
            control.should_save = save or (stopping and state.global_step < monitor.total_steps)
            control.should_training_stop |= stopping

        def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            # Each process writes its own random state.
            wait_for_all()
            if rank() == 0:
                monitor.on_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Callback()
