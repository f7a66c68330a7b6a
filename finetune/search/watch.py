"""What watches a trial while it trains and is evaluated: rungs, the budget, the end of the experiment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from finetune.errors import ConfigurationError
from finetune.progress import Progress, ProgressEvent
from finetune.search.pruning import rungs

if TYPE_CHECKING:
    from torch.nn import Module

# The held-out loss at a rung, in ninths of the training; True: stop the trial.
Report = Callable[[int, float], bool]
# The hours that the trial has taken in all; returns how many it may take, or raises `TrialStopped`.
Spend = Callable[[float], float]


class TrialStopped(Exception):  # noqa: N818 - a trial that is stopped early is no error
    """Ends a trial early; `reason` is ``pruned``, or why the experiment is over."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Watch:
    """A listener of a trial's training and evaluation, which it ends when it should not go on.

    Args:
        tell: who listens to progress.
        report: told of the held-out loss at each rung.
        spend: told of the time taken: at once when it exceeds what the trial may take, else now and then.
        used_before: hours that earlier attempts took.
        allowed: hours that the trial may take.
        interval: seconds between two calls of `spend`.
    """

    def __init__(
        self,
        *,
        tell: Progress,
        report: Report,
        spend: Spend,
        used_before: float,
        allowed: float,
        interval: float,
    ) -> None:
        self._tell, self._report, self._spend = tell, report, spend
        self._used_before, self._allowed = used_before, allowed
        self._interval = interval
        self._started = self._asked = time.monotonic()
        self._rungs_seen = False
        # Measured at rungs, where the strategy has any.
        self.held_out_loss: Callable[[Module], float] | None = None

    @property
    def gpu_hours(self) -> float:
        """Hours of one device that the trial has taken, all attempts together."""
        return self._used_before + (time.monotonic() - self._started) / 3600

    def __call__(self, event: ProgressEvent) -> None:
        """Pass progress on.

        Raises:
            TrialStopped: the trial should not go on.
            ConfigurationError: the training runs where it cannot be stopped.
        """
        self._tell(event)
        if event.stage == "training" and self.held_out_loss and event.done > 1 and not self._rungs_seen:
            raise ConfigurationError(
                "trials that may be stopped early train in one process, on one GPU",
                where="strategy: halving",
                remedy="Show each worker one GPU (CUDA_VISIBLE_DEVICES), or choose another strategy",
            )
        self._ask_now_and_then()

    def after_step(self, step: int, total_steps: int, model: Module) -> None:
        """Measure at a rung, and see whether the trial may go on.

        Raises:
            TrialStopped: it may not.
        """
        self._rungs_seen = True
        rung = rungs(total_steps).get(step)
        if rung is not None and self.held_out_loss is not None and self._report(rung, self.held_out_loss(model)):
            raise TrialStopped("pruned")
        self._ask_now_and_then()

    def _ask_now_and_then(self) -> None:
        if self.gpu_hours < self._allowed and time.monotonic() - self._asked < self._interval:
            return
        self._allowed = self._spend(self.gpu_hours)
        self._asked = time.monotonic()
