"""The local training: a base model, a plan and a dataset become an adapter, by TRL's `SFTTrainer`."""

from __future__ import annotations

import errno
import gc
import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapter_files import adapter_hash, read_adapter_config
from finetune.chat.encode import RecordEncoder
from finetune.errors import ConfigurationError, StorageFullError, TrainingError, TransientError
from finetune.planning.model_config import read_model_shape
from finetune.planning.models import TrialConfig
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import is_complete, publish_directory, read_manifest
from finetune.training.adapters import (
    load_base_model,
    peft_config,
    refuse_missing_hardware,
    refuse_untrained,
    save_adapter,
    save_pissa_start,
)
from finetune.training.batches import refuse_leaking_attention, refuse_wrong_labels
from finetune.training.card import model_card
from finetune.training.checkpoints import named_checkpoint, newest_complete, step_of
from finetune.training.data import Ints, TrainingData, read_training_data, total_steps, training_order
from finetune.training.memory import peak_memory_gb
from finetune.training.models import LossPoint, TrainingRequest, TrainingResult
from finetune.training.monitor import Monitor, callback, stop_on_sigterm
from finetune.training.ownership import StillMine, always_mine, refuse_if_taken_over
from finetune.training.plots import loss_curve_png
from finetune.training.processes import refuse_wrong_split, train_in_processes
from finetune.training.ranks import rank, world_size
from finetune.training.reporting import failure_reported, refuse_missing_tracker

if TYPE_CHECKING:
    from peft import PeftModel
    from trl import SFTConfig, SFTTrainer

KIND = "adapter"
LOG_NAME = "training_log.jsonl"
_BACKEND = "hf-peft"
_PISSA_START = "pissa_start"


def dry_run(request: TrainingRequest) -> TrainingResult:
    """Everything up to loading the model, without torch: the records are encoded and checked, the steps counted.

    Raises:
        ConfigurationError: the plan's method is not trained, or names modules that the model lacks.
        BaseModelError: the configuration or the tokenizer is missing or damaged.
        TrainingError: records have nothing to learn from.
    """
    trial = request.plan.trial_config
    refuse_untrained(trial)
    read_model_shape(request.base_model.path).targets(trial.target_modules)
    data = _read(request)
    order = training_order(data.lengths, trial)
    return TrainingResult(
        status="dry_run",
        run_id=request.run_id,
        backend=_BACKEND,
        adapter_path=None,
        adapter_hash=None,
        training_steps=total_steps(len(data), trial),
        gpu_hours=0.0,
        final_loss=None,
        tokens_seen=int(data.lengths[order].sum()),
        plan=request.plan,
    )


def train_adapter(
    request: TrainingRequest, *, on_progress: Progress = ignore_progress, still_mine: StillMine = always_mine
) -> TrainingResult:
    """Train an adapter and publish it at ``request.adapter_dir``, or return the one that is there.

    A training that was killed goes on from its newest whole checkpoint under ``request.work_dir``; on a
    CPU it then ends bit-identical to one that was not.

    Args:
        request: dataset, plan, base model and places.
        on_progress: told at least every few seconds, with loss, rate, tokens per second and the time left.
        still_mine: asked before every checkpoint and before the publication whether this process may.

    Raises:
        ConfigurationError: the plan's method needs a GPU or a library that is not there, or `resume_from` is no
            checkpoint of this training.
        BaseModelError: the base model or its tokenizer is missing or damaged.
        TrainingError: records have nothing to learn from; the loss became NaN or diverged.
        StorageFullError: the disk is full; run again when there is room.
        TransientError: the process was asked to end (SIGTERM), and a checkpoint was saved; or another process
            has taken the training over, and nothing was written.
    """
    import torch

    if is_complete(request.adapter_dir):
        return _published(request).model_copy(update={"reused": True})
    refuse_missing_hardware(request.plan.trial_config)
    refuse_missing_tracker(request.report_to)
    processes = request.processes or torch.cuda.device_count() or 1
    refuse_wrong_split(request.plan.trial_config.effective_batch, processes)
    with _full_disk_named(request.work_dir):
        try:
            result = _train(request, processes, on_progress, still_mine)
        except FileExistsError:
            # Another process was first to publish: its adapter stays.
            return _published(request).model_copy(update={"reused": True})
    shutil.rmtree(request.work_dir / "checkpoints", ignore_errors=True)
    return result


def train_share(
    request: TrainingRequest, micro_batch: int, *, on_progress: Progress, still_mine: StillMine
) -> TrainingResult:
    """Train in this process alone, or its share among the others; the process of rank 0 publishes the adapter.

    Raises:
        FinetuneError: as `train_adapter` does.
        torch.OutOfMemoryError: the micro-batch is too large.
    """
    on_progress(ProgressEvent("reading records", 0, None, "records"))
    data = _read(request)
    on_progress(ProgressEvent("loading the base model", 0, None, "models"))
    request.work_dir.mkdir(parents=True, exist_ok=True)
    with _full_disk_named(request.work_dir):
        return _attempt(request, data, micro_batch, on_progress, still_mine)


def _read(request: TrainingRequest) -> TrainingData:
    encoder = RecordEncoder.load(request.base_model.path)
    return read_training_data(request.dataset.train_path, encoder, request.plan.trial_config.max_length)


def _published(request: TrainingRequest) -> TrainingResult:
    manifest = read_manifest(request.adapter_dir, kind=KIND)
    return TrainingResult.model_validate({**manifest.results, "adapter_path": request.adapter_dir})


def _train(request: TrainingRequest, processes: int, on_progress: Progress, still_mine: StillMine) -> TrainingResult:
    """Train, with smaller and smaller micro-batches where memory runs out; the effective batch stays."""
    import torch

    trial = request.plan.trial_config
    shares = trial.effective_batch // processes
    micro_batch = max(size for size in range(1, trial.micro_batch + 1) if shares % size == 0)
    while True:
        try:
            # Where several GPUs are and one is wanted, only torchrun keeps the trainer from taking all.
            if processes == 1 and torch.cuda.device_count() <= 1:
                return train_share(request, micro_batch, on_progress=on_progress, still_mine=still_mine)
            train_in_processes(request, processes, micro_batch, on_progress=on_progress, still_mine=still_mine)
            return _published(request)
        except torch.OutOfMemoryError as error:
            needed = f"{trial.effective_batch} records a step, {micro_batch} at a time"
            if micro_batch == 1:
                raise TrainingError(
                    f"out of memory with {needed}: {error}",
                    where=request.work_dir,
                    remedy="Plan with a shorter max_length, gradient checkpointing or qlora, or take a larger GPU",
                ) from error
        # Outside the handler, or the error would keep the whole attempt's memory.
        micro_batch = max(size for size in range(1, micro_batch) if shares % size == 0)
        on_progress(ProgressEvent("out of memory: smaller micro-batch", micro_batch, None, "records"))
        gc.collect()
        torch.cuda.empty_cache()


def _attempt(
    request: TrainingRequest, data: TrainingData, micro_batch: int, on_progress: Progress, still_mine: StillMine
) -> TrainingResult:
    import torch
    from torch.utils.tensorboard import SummaryWriter

    trial = request.plan.trial_config
    checkpoints = request.work_dir / "checkpoints"
    resumed = _checkpoint_of(request, checkpoints)
    state: dict[str, Any] = resumed[1] if resumed else {"seconds": 0.0, "points": []}
    points = [LossPoint.model_validate(point) for point in state["points"]]
    log_path = request.work_dir / LOG_NAME
    order, steps = _share_order(training_order(data.lengths, trial), total_steps(len(data), trial), micro_batch, trial)
    main = rank() == 0
    if main:
        _keep_log(log_path, points)
    with (
        SummaryWriter(str(request.work_dir / "tensorboard"), purge_step=len(points))
        if main
        else nullcontext() as writer,
        stop_on_sigterm() as stop,
        failure_reported(request.report_to),
        warnings.catch_warnings(),
    ):
        # TRL's own use of names that transformers renames: nothing that a reader could act on.
        warnings.simplefilter("ignore", FutureWarning)
        monitor = Monitor(
            run_id=request.run_id,
            dataset=request.dataset.train_path,
            order=order,
            lines=data.lines,
            lengths=data.lengths,
            effective_batch=trial.effective_batch,
            total_steps=steps,
            checkpoints=checkpoints,
            log_path=log_path,
            writer=writer,
            progress=on_progress,
            stop=stop,
            still_mine=still_mine,
            checkpoint_seconds=request.checkpoint_seconds,
            seconds_before=state["seconds"],
            points=points,
        )
        trainer = make_trainer(request, data, monitor, micro_batch)
        trainer.train(resume_from_checkpoint=str(resumed[0]) if resumed else None)
        if stop.requested and trainer.state.global_step < monitor.total_steps:
            raise TransientError(
                f"the training was asked to end after step {trainer.state.global_step} of {monitor.total_steps}",
                where=checkpoints,
                remedy="Run again: it goes on from the checkpoint that was saved",
            )
    result = TrainingResult(
        status="completed",
        run_id=request.run_id,
        backend=_BACKEND,
        adapter_path=request.adapter_dir,
        adapter_hash=None,
        training_steps=len(monitor.points),
        gpu_hours=monitor.seconds / 3600 * trainer.args.n_gpu * trainer.args.world_size,
        final_loss=_final_loss(monitor.points),
        loss_curve=monitor.points,
        tokens_seen=monitor.tokens_at(monitor.total_steps),
        tokens_per_second=monitor.tokens_at(monitor.total_steps) / monitor.seconds,
        peak_memory_gb=peak_memory_gb(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        seconds=monitor.seconds,
        resumed_from_step=step_of(resumed[0]) if resumed else 0,
        micro_batch=micro_batch,
        trainable_params=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    )
    return _publish(request, trainer.model, data, result, still_mine) if main else result


def _share_order(order: Ints, steps: int, micro_batch: int, trial: TrialConfig) -> tuple[Ints, int]:
    """The order, and its steps, cut to what gives each of several processes as many micro-batches.

    Raises:
        ConfigurationError: there are fewer records than processes.
    """
    block = micro_batch * world_size()
    if world_size() == 1 or len(order) % block == 0:
        return order, steps
    order = order[: len(order) // block * block]
    if not len(order):
        raise ConfigurationError(
            f"there are fewer records than the {world_size()} processes take at once",
            where="TRAIN_PROCESSES",
            remedy="Train so few records in one process",
        )
    return order, min(steps, math.ceil(len(order) / trial.effective_batch))


def make_trainer(request: TrainingRequest, data: TrainingData, monitor: Monitor, micro_batch: int) -> SFTTrainer:
    """The trainer of a request, checked and ready for its first step.

    Raises:
        BaseModelError: the base model is missing or damaged.
        TrainingError: the trainer would learn other tokens than ours, or packed records see each other.
    """
    from peft import get_peft_model
    from transformers import AutoTokenizer, PrinterCallback, set_seed
    from transformers.utils import logging
    from trl import SFTTrainer

    logging.disable_progress_bar()
    trial = request.plan.trial_config
    model = load_base_model(request.base_model, trial)
    set_seed(trial.seed)
    adapted = get_peft_model(model, peft_config(read_model_shape(request.base_model.path), trial))
    if trial.use_pissa and rank() == 0:
        save_pissa_start(adapted, request.work_dir / _PISSA_START)
    trainer = SFTTrainer(
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
    refuse_wrong_labels(trainer, data, monitor.order)
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
        train_sampling_strategy="sequential",
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


def _publish(
    request: TrainingRequest, model: PeftModel, data: TrainingData, result: TrainingResult, still_mine: StillMine
) -> TrainingResult:
    trial = request.plan.trial_config
    with publish_directory(request.adapter_dir, kind=KIND, replace=False) as staging:
        save_adapter(model, staging.path, request.base_model, request.work_dir / _PISSA_START)
        result = result.model_copy(update={"adapter_hash": adapter_hash(staging.path)})
        config = read_adapter_config(staging.path)
        (staging.path / "README.md").write_text(model_card(request, result, config), encoding="utf-8")
        (staging.path / "loss_curve.png").write_bytes(loss_curve_png(result.loss_curve))
        shutil.copyfile(request.work_dir / LOG_NAME, staging.path / LOG_NAME)
        staging.inputs = {
            "dataset": request.dataset.fingerprint,
            "dates": request.dataset.window_dates,
            "base_model": request.base_model.model_dump(exclude={"path"}, mode="json"),
            "records": len(data),
            "truncated_records": data.truncated,
        }
        staging.parameters = trial.model_dump()
        staging.results = result.model_dump(mode="json", exclude={"adapter_path"})
        refuse_if_taken_over(still_mine, request.adapter_dir)
    return result


def _checkpoint_of(request: TrainingRequest, checkpoints: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from: of the newest and the one that the request names, the later."""
    found = newest_complete(checkpoints)
    if request.resume_from is None:
        return found
    named = named_checkpoint(request.resume_from, request.run_id)
    return found if found and step_of(found[0]) >= step_of(named[0]) else named


def _keep_log(path: Path, points: list[LossPoint]) -> None:
    """Bring the log to the steps that the checkpoint holds: the others are trained again.

    Where a checkpoint comes without its log, the log holds what the checkpoint knows of its steps.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    written = {json.loads(line)["step"]: line for line in lines if line.endswith("\n")}
    kept = [written.get(point.step, json.dumps(point.model_dump()) + "\n") for point in points]
    path.write_text("".join(kept), encoding="utf-8")


def _final_loss(points: list[LossPoint]) -> float | None:
    """The mean of the last tenth of the steps, at least five: a single step is noise."""
    last = [point.loss for point in points[-max(5, len(points) // 10) :]]
    return sum(last) / len(last) if last else None


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """Like `full_disk_named`, also where a library hides the system's error in one of its own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageFullError) or not _says_full(error):
            raise
        raise StorageFullError(
            "no space left on the disk",
            where=path,
            remedy="Free space or enlarge the volume, then run again: it goes on from the last checkpoint",
        ) from error


def _says_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and PyTorch's zip writer raise errors without errno.
    text = str(error)
    return "No space left on device" in text or "os error 28" in text or "PytorchStreamWriter failed" in text
