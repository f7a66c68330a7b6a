"""The local training: a base model, a plan and a dataset become an adapter, by TRL's `SFTTrainer`."""

from __future__ import annotations

import gc
import shutil

from finetune.errors import ConfigurationError, TrainingError
from finetune.planning.contradictions import refuse_contradictions
from finetune.planning.model_config import read_model_shape
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import is_complete, read_manifest
from finetune.training.adapters import refuse_missing_hardware, refuse_unshardable, refuse_untrained
from finetune.training.attempt import BACKEND, KIND, read_records, train_share
from finetune.training.data import training_order
from finetune.training.disk import any_full_disk_named
from finetune.training.init_adapter import refuse_unfit_start
from finetune.training.memory import note_out_of_memory, too_large_micro_batches
from finetune.training.models import TrainingRequest, TrainingResult
from finetune.training.ownership import StillMine, always_mine
from finetune.training.processes import refuse_wrong_split, train_in_processes
from finetune.training.reporting import refuse_missing_tracker


def dry_run(request: TrainingRequest) -> TrainingResult:
    """Everything up to loading the model, without torch: the records are encoded and checked, the steps counted.

    Raises:
        ConfigurationError: the plan's method is not trained, its choices exclude each other, or it names modules that
            the model lacks, or the adapter to start from is another than the plan's.
        ArtifactError: the adapter to start from is missing, damaged, or not the one that the request names.
        BaseModelError: the configuration or the tokenizer is missing or damaged.
        TrainingError: records have nothing to learn from.
    """
    trial = request.plan.trial_config
    refuse_untrained(trial)
    shape = read_model_shape(request.base_model.path)
    shape.targets(trial.target_modules)
    refuse_contradictions(trial, shape)
    refuse_unfit_start(request)
    data = read_records(request)
    order = training_order(len(data), trial)
    return TrainingResult(
        status="dry_run",
        run_id=request.run_id,
        backend=BACKEND,
        adapter_path=None,
        adapter_hash=None,
        training_steps=trial.steps(len(data)),
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
        ConfigurationError: the plan's method needs a GPU or a library that is not there, its choices exclude each
            other, `resume_from` is no checkpoint of this training, or the adapter to start from is another than the
            plan's.
        ArtifactError: the adapter to start from is missing, damaged, or not the one that the request names.
        BaseModelError: the base model or its tokenizer is missing or damaged.
        TrainingError: records have nothing to learn from; the loss became NaN or diverged.
        StorageFullError: the disk is full; run again when there is room.
        StoppedError: the process was asked to end (SIGTERM), and a checkpoint was saved.
        TransientError: another process has taken the training over, and nothing was written.
    """
    import torch

    if is_complete(request.adapter_dir):
        return _published(request).model_copy(update={"reused": True})
    refuse_missing_hardware(request.plan.trial_config)
    refuse_contradictions(request.plan.trial_config, read_model_shape(request.base_model.path))
    refuse_unfit_start(request)
    refuse_missing_tracker(request.report_to)
    processes = request.processes or torch.cuda.device_count() or 1
    nodes = request.nodes.count if request.nodes else 1
    refuse_wrong_split(request.plan.trial_config.effective_batch, processes, nodes)
    if request.sharding == "fsdp" and processes * nodes > 1:
        refuse_unshardable(request.plan.trial_config)
    with any_full_disk_named(request.work_dir):
        try:
            result = _train(request, processes, on_progress, still_mine)
        except FileExistsError:
            # Another process was first to publish: its adapter stays.
            return _published(request).model_copy(update={"reused": True})
    shutil.rmtree(request.work_dir / "checkpoints", ignore_errors=True)
    return result


def _published(request: TrainingRequest) -> TrainingResult:
    manifest = read_manifest(request.adapter_dir, kind=KIND)
    if manifest.results["run_id"] != request.run_id:
        raise ConfigurationError(
            f"here is the adapter of another training, {manifest.results['run_id']} instead of {request.run_id}",
            where=request.adapter_dir,
            remedy="Name another output, or remove this one",
        )
    return TrainingResult.model_validate({**manifest.results, "adapter_path": request.adapter_dir})


def _train(request: TrainingRequest, processes: int, on_progress: Progress, still_mine: StillMine) -> TrainingResult:
    """Train, with half the micro-batch whenever memory runs out; the effective batch stays."""
    import torch

    trial = request.plan.trial_config
    nodes = request.nodes.count if request.nodes else 1
    shares = trial.effective_batch // (processes * nodes)
    while True:
        limit = min([trial.micro_batch, *(size // 2 for size in too_large_micro_batches(request.work_dir))])
        micro_batch = max(size for size in range(1, limit + 1) if shares % size == 0)
        try:
            # Where several GPUs are and one is wanted, only torchrun keeps the trainer from taking all.
            if processes * nodes == 1 and torch.cuda.device_count() <= 1:
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
        note_out_of_memory(request.work_dir, micro_batch)
        on_progress(ProgressEvent("out of memory: half the micro-batch of", micro_batch, None, "records"))
        gc.collect()
        torch.cuda.empty_cache()
