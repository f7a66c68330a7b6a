"""TRL's `SFTTrainer` as a request wants it, checked before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.planning.model_config import read_model_shape
from finetune.training.adapters import load_base_model, peft_config, save_no_shards, save_pissa_start
from finetune.training.batches import refuse_leaking_attention, refuse_wrong_labels
from finetune.training.data import TrainingData
from finetune.training.init_adapter import load_init_weights
from finetune.training.micro_batches import micro_batches
from finetune.training.models import TrainingRequest
from finetune.training.monitor import Monitor, callback
from finetune.training.ranks import rank, world_size

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import Sampler
    from trl import SFTConfig, SFTTrainer

PISSA_START = "pissa_start"


def make_trainer(request: TrainingRequest, data: TrainingData, monitor: Monitor, micro_batch: int) -> SFTTrainer:
    """The trainer of a request, checked and ready for its first step.

    Raises:
        BaseModelError: the base model is missing or damaged.
        ArtifactError: the adapter to start from is damaged, or does not fit.
        TrainingError: the trainer would learn other tokens than ours, or packed records see each other.
    """
    from peft import get_peft_model
    from transformers import AutoTokenizer, PrinterCallback, set_seed
    from transformers.utils import logging
    from trl import SFTTrainer

    logging.disable_progress_bar()
    trial = request.plan.trial_config
    shards = world_size() if request.sharding == "fsdp" else 1
    model = load_base_model(request.base_model, trial, shards=shards)
    set_seed(trial.seed)
    adapted = get_peft_model(model, peft_config(read_model_shape(request.base_model.path), trial))
    if request.init_adapter is not None:
        load_init_weights(adapted, request.init_adapter.path)
    if shards > 1:
        save_no_shards(adapted)
    if trial.use_pissa and rank() == 0:
        save_pissa_start(adapted, request.work_dir / PISSA_START)
    lengths = data.lengths[monitor.order]
    sampler = micro_batches(lengths, trial.effective_batch, micro_batch, rank=rank(), processes=world_size())

    class Trainer(SFTTrainer):  # type: ignore[misc]  # TRL is untyped here
        def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[Any]:
            return sampler

    trainer = Trainer(
        model=adapted,
        args=_arguments(request, micro_batch, monitor.checkpoints),
        train_dataset=data.as_dataset().select(monitor.order),
        processing_class=AutoTokenizer.from_pretrained(
            request.base_model.path,
            local_files_only=True,
            trust_remote_code=request.base_model.trust_remote_code,
        ),
        callbacks=[callback(monitor)],
    )
    trainer.remove_callback(PrinterCallback)
    refuse_wrong_labels(trainer, data, monitor.order, next(iter(sampler)))
    if trial.packing:
        refuse_leaking_attention(trainer, data, monitor.order)
    return trainer


def _arguments(request: TrainingRequest, micro_batch: int, checkpoints: Path) -> SFTConfig:
    import torch
    from trl import SFTConfig

    trial = request.plan.trial_config
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(checkpoints),
        use_cpu=not on_gpu,
        bf16=trial.precision == "bf16",
        gradient_checkpointing=trial.gradient_checkpointing,
        seed=trial.seed,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=trial.effective_batch // (micro_batch * world_size()),
        ddp_find_unused_parameters=False,
        # The dataset is all epochs already, in the order in which they are trained.
        num_train_epochs=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        padding_free=trial.packing,
        learning_rate=trial.learning_rate,
        lr_scheduler_type=trial.lr_schedule,
        warmup_steps=trial.warmup_ratio,
        weight_decay=trial.weight_decay,
        optim=trial.optimizer,
        logging_steps=1,
        logging_nan_inf_filter=False,
        # The monitor decides when.
        save_strategy="no",
        save_total_limit=2,
        # TensorBoard is ours: it goes on in the same files when a training is resumed.
        report_to=request.report_to,
        run_name=request.run_id,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
