"""An experiment on this platform: its data and model, its trials as trainings like any other, its report."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.base_model.models import BaseModelRef
from finetune.base_model.resolve import resolve_base_model
from finetune.chat.encode import RecordEncoder
from finetune.dataset.discovery import discover_exports
from finetune.dataset.inspect import held_out_prompts
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.dataset.prepare import prepare_dataset
from finetune.dataset.profile import profile_dataset
from finetune.errors import ConfigurationError, DatasetError
from finetune.evaluation.evaluate import evaluate_adapter
from finetune.planning.models import TrainingPlan
from finetune.progress import Progress
from finetune.publishing import is_complete
from finetune.search.adoption import keep_configuration
from finetune.search.candidates import Bench, Candidate, experiment_space, next_candidate, plan_of
from finetune.search.ledger import best_trial
from finetune.search.models import StepResult, TrialRecord
from finetune.search.report import publish_report
from finetune.search.result import experiment_result
from finetune.search.spec import ExperimentSpec
from finetune.search.watch import TrialStopped, Watch
from finetune.training.identity import training_run_id
from finetune.training.models import TrainingRequest, TrainingResult
from lora_assets.recording import logged_figures, measurement_of
from lora_assets.settings import Settings
from resources.search_worker import INTERVAL_SECONDS, Outcome, work
from resources.study import Experiment, StudyStore

_VALIDATION_PROMPTS = 8


@dataclass(frozen=True)
class Opened:
    """An experiment with all that its trials need."""

    experiment: Experiment
    bench: Bench
    settings: Settings
    dagster_run_id: str | None = None


def open_study(settings: Settings) -> StudyStore:
    """The store of experiments, beside the run log; whoever opens it closes it."""
    url = settings.database_url.get_secret_value() if settings.database_url else ""
    return StudyStore(database_url=url, data_dir=str(settings.data_root))


def make_bench(settings: Settings, spec: ExperimentSpec, on_progress: Progress, *, weights: bool = False) -> Bench:
    """Prepare and profile the dataset that the experiment names, and find its base model.

    Args:
        settings: in force.
        spec: the experiment.
        on_progress: told of what is prepared and fetched.
        weights: without them nothing can be trained, and only what a plan needs is fetched.

    Raises:
        ConfigurationError: trainings happen elsewhere.
        DatasetError: there is no such dataset.
        BaseModelError: the model can't be found, reached, or is damaged.
    """
    base = resolve_base_model(
        spec.base_model or settings.base_model_name,
        cache_dir=settings.layout.base_models,
        revision=settings.base_model_revision,
        token=settings.hf_token.get_secret_value() if settings.hf_token else None,
        trust_remote_code=settings.trust_remote_code,
        weights=weights,
        on_progress=on_progress,
    )
    dataset = _dataset(settings, spec, on_progress)
    profile = profile_dataset(dataset, encoder=RecordEncoder.load(base.path), on_progress=on_progress)
    return bench_of(settings, dataset, profile, base)


def bench_of(settings: Settings, dataset: PreparedDataset, profile: DatasetProfile, base: BaseModelRef) -> Bench:
    """What trials are made on, from what is prepared."""
    if settings.training_backend != "hf-peft":
        raise ConfigurationError(
            "an experiment trains here, where a trial can be measured and stopped",
            where=f"TRAINING_BACKEND={settings.training_backend}",
            remedy="Run it with TRAINING_BACKEND=hf-peft",
        )
    return Bench(
        dataset=dataset,
        profile=profile,
        base_model=base,
        device=settings.device,
        vram_limit_gb=settings.vram_limit_gb,
        tokens_per_second=settings.tokens_per_second,
        price_per_gpu_hour=settings.gpu_hour_price,
    )


def _dataset(settings: Settings, spec: ExperimentSpec, on_progress: Progress) -> PreparedDataset:
    parameters = settings.prepare_parameters
    if spec.dataset_path is not None:
        files = discover_exports(spec.dataset_path.parent, glob.escape(spec.dataset_path.name))
        parameters = parameters.model_copy(update={"window": "date"})
    else:
        files = discover_exports(settings.exports, settings.pattern)
    if not files:
        raise DatasetError(
            "there is no dataset",
            where=spec.dataset_path or settings.exports,
            remedy="Name a dataset_path, or put exports there",
        )
    date = spec.dataset_date.isoformat() if spec.dataset_date else files[-1].date
    return prepare_dataset(
        files,
        date=date,
        layout=settings.layout,
        parameters=parameters,
        workers=settings.prepare_workers,
        on_progress=on_progress,
    )


def open_experiment(
    store: StudyStore, spec: ExperimentSpec, bench: Bench, settings: Settings, *, dagster_run_id: str | None = None
) -> Opened:
    """The experiment of this specification on this bench, made if need be.

    Raises:
        ConfigurationError: there is nothing to search, or a range cannot be drawn from.
        RemoteError: the database cannot be reached.
    """
    space = experiment_space(spec, bench)
    name = spec.identity(bench.dataset.fingerprint, bench.base_model.fingerprint)
    return Opened(store.open_experiment(name, spec, space), bench, settings, dagster_run_id)


def own_gpu(index: int) -> None:
    """Show this process one GPU of several, before PyTorch looks: so many workers, so many GPUs in turn."""
    import torch

    if "CUDA_VISIBLE_DEVICES" not in os.environ and torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index % torch.cuda.device_count())


def run_worker(opened: Opened, on_progress: Progress, *, interval: float = INTERVAL_SECONDS) -> None:
    """Work on the experiment's trials until it is over; see `resources.search_worker.work`."""
    experiment, bench = opened.experiment, opened.bench

    def propose(history: Sequence[TrialRecord], remaining: float) -> Candidate | None:
        # What the trials so far took corrects the estimates of the next.
        measured = experiment.store.measurements(bench.base_model.name, bench.device)
        return next_candidate(experiment.spec, bench.measured(measured), experiment.space, history, remaining)

    def run(trial: TrialRecord, watch: Watch) -> Outcome:
        return run_trial(opened, trial, watch)

    work(experiment, propose, run, on_progress=on_progress, interval=interval)


def run_trial(opened: Opened, trial: TrialRecord, watch: Watch) -> Outcome:
    """Train one trial and evaluate its adapter; what was made before is taken as it is.

    Raises:
        TrialStopped: the trial was ended early.
        FinetuneError: as trainings and evaluations raise.
    """
    spec, bench, layout = opened.experiment.spec, opened.bench, opened.settings.layout
    request = _request(opened, trial)
    longest = _longest(opened, trial)
    if spec.strategy == "halving":
        from finetune.search.heldout import HeldOutLoss

        watch.held_out_loss = HeldOutLoss(bench.dataset.eval_path, bench.base_model.path, max_length=longest)
    result = _trained(opened, request, watch)
    report = evaluate_adapter(
        base_model=bench.base_model,
        adapter_path=request.adapter_dir,
        dataset=bench.dataset.eval_path,
        output_dir=layout.model(request.run_id, "trial"),
        run_id=request.run_id,
        max_length=longest,
        on_progress=watch,
        sample_answers=0,
    )
    metrics = {
        "eval_loss": report.eval_loss,
        "eval_perplexity": report.eval_perplexity,
        "base_loss": report.base_loss,
        "delta_vs_base_loss": report.delta_vs_base_loss,
        "training_steps": float(result.training_steps),
        **({} if result.final_loss is None else {"final_loss": result.final_loss}),
    }
    return Outcome(
        value=metrics[spec.stop_metric],
        metrics=metrics,
        run_id=request.run_id,
        adapter_path=str(request.adapter_dir),
    )


def _request(opened: Opened, trial: TrialRecord) -> TrainingRequest:
    bench, layout = opened.bench, opened.settings.layout
    plan: TrainingPlan = plan_of(opened.experiment.spec, bench, trial.params)
    if trial.trial_config is not None:
        # As it was proposed, whatever later measurements would make of it.
        plan = plan.model_copy(update={"trial_config": trial.trial_config})
    run_id = training_run_id(
        date=bench.dataset.date,
        dataset_fingerprint=bench.dataset.fingerprint,
        trial=plan.trial_config,
        base_model=bench.base_model,
        backend="hf-peft",
    )
    return TrainingRequest(
        run_id=run_id,
        date=bench.dataset.date,
        dataset=bench.dataset,
        plan=plan,
        base_model=bench.base_model,
        adapter_dir=layout.adapter(run_id),
        work_dir=layout.work(run_id),
        report_to=opened.settings.report_to,
        processes=1,
    )


def _longest(opened: Opened, trial: TrialRecord) -> int:
    """The length at which all trials are measured, so that they can be compared: the longest that one may train."""
    lengths = [
        int(length)
        for name, span in opened.experiment.space.items()
        if name.rpartition(".")[2] == "max_length"
        for length in span.choices or []
    ]
    return max(lengths, default=trial.trial_config.max_length if trial.trial_config else 1024)


def _trained(opened: Opened, request: TrainingRequest, watch: Watch) -> TrainingResult:
    """Train under the training's lease and a row of the run log."""
    from finetune.training.sft import train_adapter

    store = opened.experiment.store
    if is_complete(request.adapter_dir):
        return train_adapter(request)
    spec = opened.experiment.spec
    with store.lease(request.run_id, on_progress=watch) as lease:
        # Whoever held the lease until now may have finished it.
        if is_complete(request.adapter_dir):
            return train_adapter(request)
        exports = spec.dataset_path.parent if spec.dataset_path else opened.settings.exports
        with store.recording(
            run_id=request.run_id,
            dataset_paths=[exports / name for name in request.dataset.records_by_file],
            base_model=request.base_model.name,
            backend="hf-peft",
            date=request.date,
            dagster_run_id=opened.dagster_run_id,
            dagster_root_run_id=f"experiment {opened.experiment.name}",
        ) as row:
            try:
                result = train_adapter(request, on_progress=watch, still_mine=lease.still_mine)
            except TrialStopped as stopped:
                # Stopped early is no failure; nobody goes on from its checkpoints.
                row.complete(None, {"stopped": stopped.reason, "gpu_hours": watch.gpu_hours})
                shutil.rmtree(request.work_dir, ignore_errors=True)
                raise
            if measurement := measurement_of(request, result):
                row.measured(measurement)
            row.complete(result.adapter_path, logged_figures(result))
    return result


def conclude(opened: Opened, on_progress: Progress) -> StepResult:
    """Merge the best adapter where that is wanted, keep its configuration, and publish the report.

    Raises:
        ExportError: the merge failed.
        StorageFullError: the disk is full.
    """
    experiment, layout = opened.experiment, opened.settings.layout
    history = experiment.history()
    ended = experiment.over()
    best = best_trial(history)
    merged = _merge(opened, best, on_progress) if best and experiment.spec.auto_merge else None
    if best and best.trial_config:
        keep_configuration(layout.configurations, best.trial_config)
    result = experiment_result(experiment.name, experiment.spec, history, ended=ended, merged_path=merged)
    publish_report(
        layout.experiment(experiment.name),
        name=experiment.name,
        spec=experiment.spec,
        space=experiment.space,
        history=history,
        ended=ended,
        result=result,
    )
    return result


def _merge(opened: Opened, best: TrialRecord, on_progress: Progress) -> Path:
    from finetune.export.merge import merge_adapter
    from finetune.export.merge_gguf import merge_to_gguf

    spec, bench, layout = opened.experiment.spec, opened.bench, opened.settings.layout
    prompts = held_out_prompts(bench.dataset.eval_path, _VALIDATION_PROMPTS)
    adapter = Path(best.adapter_path or "")
    if spec.merge_format == "gguf":
        return merge_to_gguf(
            base_model=bench.base_model,
            adapter_path=adapter,
            output_dir=layout.model(best.run_id, "merged-gguf"),
            run_id=best.run_id,
            quantization=opened.settings.gguf_quantization,
            validate_on=prompts,
            on_progress=on_progress,
        ).file.path
    # As the asset `merged_model` does, which finds it made already.
    return merge_adapter(
        base_model=bench.base_model,
        adapter_path=adapter,
        output_dir=layout.model(best.run_id, "merged" if spec.merge_format == "safetensors" else "merged-pytorch"),
        run_id=best.run_id,
        output_format=spec.merge_format,
        validate_on=prompts,
        on_progress=on_progress,
    ).path
