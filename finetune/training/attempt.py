"""One attempt at a training, in one process or as its share among several: from the last checkpoint to the adapter."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.adapter_files import adapter_hash, read_adapter_config
from finetune.chat.encode import RecordEncoder
from finetune.errors import StoppedError
from finetune.progress import Progress, ProgressEvent
from finetune.publishing import publish_directory
from finetune.reproduction.provenance import describe_process
from finetune.training.adapters import save_adapter
from finetune.training.card import model_card
from finetune.training.checkpoints import named_checkpoint, newest_complete, step_of
from finetune.training.data import TrainingData, read_training_data, training_order
from finetune.training.disk import any_full_disk_named
from finetune.training.identity import CODE_VERSION
from finetune.training.memory import peak_memory_gb, too_large_micro_batches
from finetune.training.micro_batches import shared
from finetune.training.models import LossPoint, TrainingRequest, TrainingResult
from finetune.training.monitor import Monitor, stop_on_sigterm
from finetune.training.ownership import StillMine, refuse_if_taken_over
from finetune.training.plots import loss_curve_png
from finetune.training.ranks import rank, world_size
from finetune.training.reporting import tracked_run
from finetune.training.trainer import PISSA_START, make_trainer

if TYPE_CHECKING:
    from peft import PeftModel

KIND = "adapter"
LOG_NAME = "training_log.jsonl"
BACKEND: Literal["hf-peft"] = "hf-peft"


def train_share(
    request: TrainingRequest, micro_batch: int, *, on_progress: Progress, still_mine: StillMine
) -> TrainingResult:
    """Train in this process alone, or its share among the others; the process of rank 0 publishes the adapter.

    Raises:
        FinetuneError: as `train_adapter` does.
        torch.OutOfMemoryError: the micro-batch is too large.
    """
    on_progress(ProgressEvent("reading records", 0, None, "records"))
    data = read_records(request)
    on_progress(ProgressEvent("loading the base model", 0, None, "models"))
    request.work_dir.mkdir(parents=True, exist_ok=True)
    with any_full_disk_named(request.work_dir):
        return _attempt(request, data, micro_batch, on_progress, still_mine)


def read_records(request: TrainingRequest) -> TrainingData:
    """The records of a request, as its base model's tokenizer and chat template encode them.

    Raises:
        BaseModelError: the tokenizer is missing or damaged.
        TrainingError: records have nothing to learn from.
    """
    encoder = RecordEncoder.load(request.base_model.path)
    return read_training_data(request.dataset.train_path, encoder, request.plan.trial_config.max_length)


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
    order = shared(training_order(len(data), trial), world_size())
    main = rank() == 0
    if main:
        _keep_log(log_path, points)
    with (
        SummaryWriter(str(request.work_dir / "tensorboard"), purge_step=len(points))
        if main
        else nullcontext() as writer,
        stop_on_sigterm() as stop,
        tracked_run(request.report_to),
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
            total_steps=math.ceil(len(order) / trial.effective_batch),
            checkpoints=checkpoints,
            log_path=log_path,
            writer=writer,
            progress=on_progress,
            stop=stop,
            still_mine=still_mine,
            checkpoint_seconds=request.checkpoint_seconds,
            seconds_before=state["seconds"],
            points=points,
            goes_on=request.init_adapter is not None,
        )
        trainer = make_trainer(request, data, monitor, micro_batch)
        trainer.train(resume_from_checkpoint=str(resumed[0]) if resumed else None)
        if stop.requested and trainer.state.global_step < monitor.total_steps:
            raise StoppedError(
                f"the training was asked to end after step {trainer.state.global_step} of {monitor.total_steps}",
                where=checkpoints,
                remedy="Run again: it goes on from the checkpoint that was saved",
            )
    result = TrainingResult(
        status="completed",
        run_id=request.run_id,
        backend=BACKEND,
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
        processes=world_size(),
        resumed_from_step=step_of(resumed[0]) if resumed else 0,
        micro_batch=micro_batch,
        out_of_memory=too_large_micro_batches(request.work_dir),
        trainable_params=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    )
    return _publish(request, trainer.model, data, result, still_mine) if main else result


def _publish(
    request: TrainingRequest, model: PeftModel, data: TrainingData, result: TrainingResult, still_mine: StillMine
) -> TrainingResult:
    trial = request.plan.trial_config
    with publish_directory(request.adapter_dir, kind=KIND, replace=False) as staging:
        save_adapter(model, staging.path, request.base_model, request.work_dir / PISSA_START)
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
            **({"init_adapter": init.model_dump(exclude={"path"})} if (init := request.init_adapter) else {}),
            # What it takes to train it again.
            "request": request.model_dump(mode="json"),
            "code_version": CODE_VERSION,
            "provenance": describe_process().model_dump(mode="json"),
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
