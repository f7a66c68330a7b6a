"""The switch between local and remote training: one abstract resource, two that are it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import dagster as dg

from finetune.progress import Progress
from finetune.training.models import TrainingRequest, TrainingResult
from finetune.training.ownership import StillMine, always_mine

Backend = Literal["hf-peft", "h2o"]
BACKEND_LABELS: Mapping[str, str] = {"hf-peft": "Local Training (PEFT)", "h2o": "Remote Training (H2O)"}

# Called with a remote experiment's id and a link to it, as soon as there is one.
OnExternalRun = Callable[[str, str], None]


class LoraTrainer(dg.ConfigurableResource, ABC):  # type: ignore[type-arg]  # generic in the value handed to assets: itself
    """Makes an adapter of a request; whoever asks does not learn where it was trained."""

    @property
    @abstractmethod
    def backend(self) -> Backend:
        """The name in ``TRAINING_BACKEND`` and in the run log."""

    @property
    def label(self) -> str:
        """What a person reads, such as ``Remote Training (H2O)``."""
        return BACKEND_LABELS[self.backend]

    @abstractmethod
    def train(
        self,
        request: TrainingRequest,
        *,
        on_progress: Progress,
        on_external_run: OnExternalRun,
        still_mine: StillMine = always_mine,
    ) -> TrainingResult:
        """Train, and publish the adapter in PEFT's layout at `request.adapter_dir`.

        Safe to be killed and called again with the same request: work in progress is continued, and a
        complete adapter is handed back as it is.

        Args:
            request: what to train, and where to put it.
            on_progress: told of steps and losses.
            on_external_run: told of the remote experiment, before anything is waited for.
            still_mine: asked before every checkpoint and before the publication whether this process may.

        Raises:
            PermanentError: trying again cannot help.
            TransientError: trying again later may help.
        """

    def cancel(self, run_id: str, work_dir: Path) -> bool:
        """Stop what runs elsewhere for a training that nobody wants any more; tells whether it did.

        Args:
            run_id: the training's name, as in its request.
            work_dir: the training's work directory, as in its request.

        Raises:
            PermanentError: trying again cannot help.
            TransientError: what runs elsewhere could not be reached.
        """
        return False
