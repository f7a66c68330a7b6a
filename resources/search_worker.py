"""One worker of an experiment: ask, train, evaluate, tell, until something ends it."""

import logging
import time
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from finetune.errors import PermanentError, RemoteError, TrainingError
from finetune.progress import Progress, ProgressEvent
from finetune.search.models import StopReason, TrialRecord
from finetune.search.watch import TrialStopped, Watch
from resources.experiment import Experiment, Propose, Turn
from resources.lease import LEASE_SECONDS

_logger = logging.getLogger(__name__)

# Between two looks at what the other workers do; a tenth of the seconds between two checkpoints.
INTERVAL_SECONDS = 10.0


class Outcome(BaseModel):
    """What a trial found: the value that is minimised, other figures, and where its adapter lies."""

    model_config = ConfigDict(frozen=True)

    value: float
    metrics: dict[str, float]
    run_id: str
    adapter_path: str


# Trains and evaluates a trial under a watch, which may end it.
Run = Callable[[TrialRecord, Watch], Outcome]


def work(
    experiment: Experiment,
    propose: Propose,
    run: Run,
    *,
    on_progress: Progress,
    interval: float = INTERVAL_SECONDS,
) -> StopReason:
    """Work on trials until the experiment is over; several workers may, and any may be killed and started again.

    A training that goes wrong (it diverged, ran out of memory) is a failed trial; what would go wrong with every
    trial ends the work.

    Args:
        experiment: whose trials.
        propose: the next candidate from the history and what is left of the budget.
        run: trains and evaluates.
        on_progress: told of trials and of their progress.
        interval: seconds between two looks at the budget and at the other workers.

    Returns:
        What ended the experiment.

    Raises:
        PermanentError: no trial can succeed; the trial at hand is marked as failed.
        TransientError: this worker was asked to end; its trial is gone on with by the next.
    """
    waiting = False
    while True:
        with experiment.next_trial(propose) as turn:
            if isinstance(turn, Turn):
                waiting = False
                _try(experiment, turn, run, on_progress, interval)
                continue
        if turn != "wait":
            return turn
        if not waiting:
            on_progress(ProgressEvent("waiting for other workers", 0, None, "trials"))
        waiting = True
        time.sleep(min(interval, 1.0))


def _try(experiment: Experiment, turn: Turn, run: Run, on_progress: Progress, interval: float) -> None:
    trial = turn.trial
    on_progress(ProgressEvent(f"trial {trial.number}", 0, None, "trials"))

    allowed = trial.reserved_gpu_hours

    def spend(used: float) -> float:
        nonlocal allowed
        try:
            allowed = experiment.spend(turn, used)
        except RemoteError as error:
            # Before its lease is over nobody else can have taken the trial; what it must not take is little.
            if used > allowed + LEASE_SECONDS / 3600:
                raise
            _logger.warning("trial %s goes on without its ledger: %s", trial.number, error)
            return max(allowed, used + interval / 3600)
        return allowed

    watch = Watch(
        tell=on_progress,
        report=lambda rung, loss: experiment.report(turn, rung, loss),
        spend=spend,
        used_before=trial.gpu_hours,
        allowed=allowed,
        interval=interval,
    )
    try:
        found = run(trial, watch)
    except TrialStopped as stopped:
        experiment.end(turn, "pruned", reason=stopped.reason, gpu_hours=watch.gpu_hours)
    except TrainingError as error:
        experiment.end(turn, "failed", reason=str(error), gpu_hours=watch.gpu_hours)
    except PermanentError as error:
        experiment.end(turn, "failed", reason=str(error), gpu_hours=watch.gpu_hours)
        raise
    else:
        experiment.end(turn, "completed", gpu_hours=watch.gpu_hours, **found.model_dump())
