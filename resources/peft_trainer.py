"""Local training with PEFT and TRL."""

from finetune.progress import Progress
from finetune.training.models import TrainingRequest, TrainingResult
from finetune.training.ownership import StillMine, always_mine
from resources.trainer import Backend, LoraTrainer, OnExternalRun


class PeftTrainer(LoraTrainer):
    """Trains in this process, on its GPU or CPU."""

    @property
    def backend(self) -> Backend:
        """``hf-peft``."""
        return "hf-peft"

    def train(
        self,
        request: TrainingRequest,
        *,
        on_progress: Progress,
        on_external_run: OnExternalRun,
        still_mine: StillMine = always_mine,
    ) -> TrainingResult:
        """Train with `finetune.training.sft`; there is no external run to tell of."""
        from finetune.training.sft import train_adapter

        return train_adapter(request, on_progress=on_progress, still_mine=still_mine)
