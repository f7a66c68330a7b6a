"""An experiment on this platform: its data and model, its trials as trainings like any other, its report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.dataset.inspect import held_out_prompts
from finetune.planning.models import TrainingPlan
from finetune.progress import Progress
from finetune.publishing import is_complete, read_manifest
from finetune.reproduction.models import ExperimentManifest, MergedOutput, StoppedTraining
from finetune.search.adoption import keep_configuration
from finetune.search.candidates import Bench, Candidate, experiment_space, next_candidate, plan_of
from finetune.search.ledger import best_trial
from finetune.search.models import StepResult, TrialRecord
from finetune.search.report import publish_report
from finetune.search.result import experiment_result, figures_of
from finetune.search.spec import ExperimentSpec
from finetune.search.watch import TrialStopped, Watch
from finetune.training.identity import CODE_VERSION
from finetune.training.models import TrainingRequest
from lora_assets.laboratory import Laboratory, evaluate, evaluation_directory, request_for, train
from lora_assets.manifests import manifest_of
from lora_assets.settings import Settings
from resources.experiment import Experiment
from resources.run_log import Recording
from resources.search_worker import INTERVAL_SECONDS, Outcome, work
from resources.study import StudyStore

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
    spec, bench = opened.experiment.spec, opened.bench
    longest = _longest(opened, trial)
    if spec.strategy == "halving":
        from finetune.search.heldout import HeldOutLoss

        watch.held_out_loss = HeldOutLoss(bench.dataset.eval_path, bench.base_model.path, max_length=longest)

    def settle_stopped(request: TrainingRequest, row: Recording, error: Exception) -> None:
        if isinstance(error, TrialStopped):
            # Stopped early is no failure; nobody goes on from its checkpoints.
            row.complete(None, {"stopped": error.reason, "gpu_hours": watch.gpu_hours})
            shutil.rmtree(request.work_dir, ignore_errors=True)

    laboratory = _laboratory(opened)
    trained = train(laboratory, _plan(opened, trial), on_progress=watch, on_error=settle_stopped)
    request, result = trained.request, trained.result
    report = evaluate(laboratory, request.adapter_dir, run_id=request.run_id, max_length=longest, on_progress=watch)
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


def _laboratory(opened: Opened) -> Laboratory:
    path = opened.experiment.spec.dataset_path
    return Laboratory(
        opened.bench,
        opened.settings,
        opened.experiment.store,
        f"experiment {opened.experiment.name}",
        opened.dagster_run_id,
        path.parent if path else None,
    )


def _plan(opened: Opened, trial: TrialRecord) -> TrainingPlan:
    plan = plan_of(opened.experiment.spec, opened.bench, trial.params)
    if trial.trial_config is None:
        return plan
    # As it was proposed, whatever later measurements would make of it.
    return plan.model_copy(update={"trial_config": trial.trial_config})


def _longest(opened: Opened, trial: TrialRecord) -> int:
    """The length at which all trials are measured, so that they can be compared: the longest that one may train."""
    lengths = [
        int(length)
        for name, span in opened.experiment.space.items()
        if name.rpartition(".")[2] == "max_length"
        for length in span.choices or []
    ]
    return max(lengths, default=trial.trial_config.max_length if trial.trial_config else 1024)


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
        manifest=_manifest(opened, history).model_copy(
            update={"merged": _merged_output(merged, best.run_id) if merged and best else None}
        ),
    )
    return result


def _merged_output(merged: Path, run_id: str) -> MergedOutput:
    directory = merged if merged.is_dir() else merged.parent
    # As they were hashed when it was published.
    return MergedOutput(run_id=run_id, path=directory, outputs=read_manifest(directory).outputs)


def _manifest(opened: Opened, history: Sequence[TrialRecord]) -> ExperimentManifest:
    experiment, layout, held_out = opened.experiment, opened.settings.layout, opened.bench.dataset.eval_path
    trainings: dict[Path, list[Path]] = {}
    stopped: dict[str, StoppedTraining] = {}
    named: list[TrialRecord] = []
    laboratory = _laboratory(opened)
    for trial in history:
        if trial.state == "completed" and trial.adapter_path is not None:
            report = evaluation_directory(layout, trial.run_id, held_out, _longest(opened, trial))
            # Earlier versions kept it elsewhere.
            trainings[Path(trial.adapter_path)] = [report] if is_complete(report) else []
        elif trial.trial_config is not None and trial.state in ("pruned", "failed"):
            request = request_for(laboratory, _plan(opened, trial))
            stopped[request.run_id] = StoppedTraining(request=request, reason=trial.reason, code_version=CODE_VERSION)
            trial = trial.model_copy(update={"run_id": request.run_id})
        named.append(trial)
    published = {path.name for path in trainings}
    return manifest_of(
        opened.settings,
        experiment.spec,
        kind="hpo_study",
        name=experiment.name,
        seed=experiment.spec.seed,
        trainings=trainings,
        # A configuration that failed once may have ended well in another trial.
        stopped=[training for run_id, training in stopped.items() if run_id not in published],
        figures=figures_of(named, experiment.spec),
    )


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
