"""Waiting for an experiment to end."""

import time
from collections.abc import Callable

from finetune.errors import TrainingError
from finetune.progress import Progress, ProgressEvent
from resources.h2o.client import H2OClient, backoff
from resources.h2o.protocol import Experiment

_LOG_LINES = 20


class StalledError(TrainingError):
    """The experiment runs, but nothing has been heard of it for too long."""


def wait_for_end(
    client: H2OClient, experiment: Experiment, *, deadline: Callable[[], None], on_progress: Progress
) -> Experiment:
    """Look at the experiment until it has finished.

    Looks become rarer while nothing changes, and frequent again when something does.

    Args:
        client: the connection.
        experiment: as last seen.
        deadline: raises when the whole has taken too long.
        on_progress: told of each change.

    Raises:
        StalledError: it makes no progress.
        TrainingError: it failed, was stopped, or has vanished.
        RemoteError: the server stays away.
    """
    timing = client.timing
    _tell(experiment, on_progress)
    changed, quiet_looks = time.monotonic(), 0
    while experiment.status in ("queued", "running"):
        deadline()
        time.sleep(backoff(timing.poll, timing.poll_ceiling, quiet_looks))
        try:
            seen = client.get_experiment(experiment.id)
        except TrainingError as error:
            # What it said last is all that is left of it.
            raise TrainingError(f"{error.what}{_log(experiment)}", where=error.where, remedy=error.remedy) from None
        quiet_looks += 1
        if (seen.status, seen.step, seen.metrics) != (experiment.status, experiment.step, experiment.metrics):
            _tell(seen, on_progress)
            changed, quiet_looks = time.monotonic(), 0
        elif seen.status == "running" and time.monotonic() - changed > timing.stalled:
            raise StalledError(
                f"the experiment {seen.id} has stalled: no news for {timing.stalled:g} s at step "
                f"{seen.step}{_log(seen)}",
                where=seen.url or client.api_url,
                remedy="Look at it on the server; it was left as it is, and a later run will wait for it again",
            )
        experiment = seen
    if experiment.status != "finished":
        verb = "failed" if experiment.status == "failed" else "was stopped"
        reason = f": {experiment.error}" if experiment.error else ""
        raise TrainingError(
            f"the experiment {experiment.id} {verb} on the H2O server{reason}{_log(experiment)}",
            where=experiment.url or client.api_url,
            remedy="Correct what its log says; the next run creates a new experiment",
        )
    return experiment


def _tell(experiment: Experiment, on_progress: Progress) -> None:
    if experiment.status == "queued":
        on_progress(ProgressEvent("waiting in the H2O server's queue", 0, experiment.total_steps, "steps"))
    else:
        on_progress(
            ProgressEvent("remote training", experiment.step, experiment.total_steps, "steps", experiment.metrics)
        )


def _log(experiment: Experiment) -> str:
    if not experiment.log_tail:
        return ""
    return "; the end of its log:\n" + "\n".join(experiment.log_tail.splitlines()[-_LOG_LINES:]) + "\n"
