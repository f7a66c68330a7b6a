"""What runs elsewhere for a cancelled run ends with it, also where its server is away just then.

What became of it stands in the error of the run log's row. While that says only that the run was cancelled, or that its
experiment may still run, the server is asked again, by whoever looks for what was left behind.
"""

import logging
from pathlib import Path

from finetune.errors import FinetuneError, TrainingError
from finetune.layout import DataLayout
from resources.run_log import RunLog
from resources.trainer import LoraTrainer
from sensors.run_failure import CANCELLED

_logger = logging.getLogger(__name__)

STILL_RUNS = f"{CANCELLED}; its experiment may still run"


def cancel_experiment(trainer: LoraTrainer, run_id: str, work_dir: Path) -> str:
    """Cancel what runs elsewhere for a training whose run was cancelled; returns what its row is to say."""
    try:
        cancelled = trainer.cancel(run_id, work_dir)
    except TrainingError as error:
        return f"{CANCELLED}; its experiment cannot be: {error}"
    except FinetuneError as error:
        return f"{STILL_RUNS}: {error}"
    if cancelled:
        return f"{CANCELLED}; its experiment was cancelled"
    return f"{CANCELLED}; it has no experiment, or the server cannot cancel it"


def cancel_experiments(trainer: LoraTrainer, run_log: RunLog, layout: DataLayout) -> list[str]:
    """Cancel what still runs elsewhere for cancelled runs, unless another run has taken their training up since.

    Returns:
        What is left of it, for a person to read.

    Raises:
        RemoteError: the database cannot be reached.
        ConfigurationError: its tables cannot be made or used.
    """
    for row in run_log.failed_for(CANCELLED, trainer.backend):
        before = row.error_message or ""
        if row.training_run_id is None or not (before == CANCELLED or before.startswith(STILL_RUNS)):
            continue
        said = cancel_experiment(trainer, row.training_run_id, layout.work(row.training_run_id))
        run_log.correct(row, said)
        if said.startswith(STILL_RUNS):
            _logger.warning("row %s: %s", row.id, said)
            # The server is as much away for the others, and whoever waits for it has no time for all.
            return [f"row {row.id}: {said}"]
    return []
