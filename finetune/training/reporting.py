"""Trackers that a training reports to beside TensorBoard, by transformers' own callbacks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from finetune.errors import ConfigurationError

Tracker = Literal["none", "mlflow", "wandb"]


def refuse_missing_tracker(tracker: Tracker) -> None:
    """Check that the tracker's library is there, before anything is loaded.

    Raises:
        ConfigurationError: it is not.
    """
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ConfigurationError(
            f"{tracker} is not installed",
            where=f"REPORT_TO={tracker}",
            remedy=f"Install lora-assets[{tracker}], or unset REPORT_TO",
        )


@contextmanager
def tracked_run(tracker: Tracker) -> Iterator[None]:
    """End the tracker's run with the block, as failed if it fails: one left open swallows the next one's figures."""
    try:
        yield
    except BaseException:
        _end(tracker, failed=True)
        raise
    _end(tracker, failed=False)


def _end(tracker: Tracker, *, failed: bool) -> None:
    if tracker == "mlflow":
        import mlflow

        mlflow.end_run("FAILED" if failed else "FINISHED")
    elif tracker == "wandb":
        import wandb

        wandb.finish(exit_code=int(failed))
