"""An ablation on this platform: its configurations as trainings like any other, its report."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.errors import ArtifactError, ConfigurationError, TrainingError
from finetune.evaluation.losses import RecordLosses, read_losses
from finetune.planning.cost import gpu_hours, refuse_all_above
from finetune.planning.models import TrainingPlan
from finetune.progress import Progress, ProgressEvent
from finetune.publishing import is_complete, sha256_file
from finetune.search.ablation.report import (
    AblationResult,
    ArmRun,
    conclusion_of,
    figures_of,
    publish_ablation,
    read_ablation,
    step_result,
)
from finetune.search.ablation.spec import AblationSpec, Arm, arms_of, shown
from finetune.search.candidates import Bench
from finetune.search.models import StepResult
from finetune.search.traced import ablation_figures
from lora_assets.laboratory import Laboratory, evaluate, request_for, train
from lora_assets.manifests import manifest_of
from lora_assets.settings import Settings
from resources.run_log import RunLog


def run_ablation(
    spec: AblationSpec,
    bench: Bench,
    settings: Settings,
    run_log: RunLog,
    on_progress: Progress,
    *,
    dagster_run_id: str | None = None,
) -> StepResult:
    """Train and evaluate every configuration with every seed, and publish the report.

    What was trained before, also by a run that was killed, is taken as it is; a training that fails is told in its
    configuration's row.

    Raises:
        ConfigurationError: a value does not go with the rest, or all trainings would take longer than they may; nothing
            was trained.
        TransientError: a server stays away, the disk is full, or the process was asked to end.
        FinetuneError: as preparations of trainings raise.
    """
    of = bench.dataset.fingerprint, bench.base_model.fingerprint
    name = spec.name(*of)
    directory = settings.layout.experiment(name)
    # Whoever else works on it has published it by then.
    with run_log.lease(name, on_progress=on_progress):
        if (known := read_ablation(directory, *of)) is not None:
            return step_result(known, directory)
        exports = spec.dataset_path.parent if spec.dataset_path else None
        laboratory = Laboratory(bench, settings, run_log, name, dagster_run_id, exports)
        arms = arms_of(spec, bench.measured(run_log.measurements(bench.base_model.name, bench.device)))
        _refuse_before_training(laboratory, arms, on_progress)
        length = max(arm.trial.max_length for arm in arms)
        losses: dict[str, RecordLosses] = {}
        runs = [[_run(laboratory, arm, plan, length, losses, on_progress) for plan in arm.plans] for arm in arms]
        figures = figures_of(arms, runs, losses)
        result = AblationResult(
            name=name,
            spec=spec,
            dataset_fingerprint=bench.dataset.fingerprint,
            dataset_sha256=sha256_file(bench.dataset.eval_path),
            base_model=bench.base_model.name,
            base_model_fingerprint=bench.base_model.fingerprint,
            max_length=length,
            records=max((len(each.lines) for each in losses.values()), default=0),
            gpu_hours=sum(run.gpu_hours for each in runs for run in each),
            arms=figures,
            conclusion=conclusion_of(spec, figures),
        )
        ended = [run for arm in result.arms for run in arm.runs if run.adapter is not None]
        manifest = manifest_of(
            settings,
            spec,
            kind="ablation_report",
            name=name,
            seed=spec.seed,
            trainings={run.adapter: [run.evaluation] if run.evaluation else [] for run in ended if run.adapter},
            figures=ablation_figures(result),
        )
        publish_ablation(directory, result, manifest)
        return step_result(result, directory)


def _refuse_before_training(laboratory: Laboratory, arms: Sequence[Arm], on_progress: Progress) -> None:
    """Check that all can be trained here, and in the time that is allowed; tell what they will take."""
    from finetune.training.adapters import refuse_missing_hardware

    for arm in arms:
        try:
            refuse_missing_hardware(arm.trial)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{shown(arm.changed)}: {error.what}", where=error.where, remedy=error.remedy
            ) from error
    plans = [plan for arm in arms for plan in arm.plans]
    todo = [plan for plan in plans if not is_complete(request_for(laboratory, plan).adapter_dir)]
    refuse_all_above(todo, laboratory.settings.max_gpu_hours)
    hours = gpu_hours(todo)
    told = "of unknown time" if hours is None else f"of about {hours:.3g} GPU-hours"
    on_progress(ProgressEvent(f"{laboratory.label}: {len(todo)} of {len(plans)} trainings to do, {told}", 0, None, ""))


def _run(
    laboratory: Laboratory,
    arm: Arm,
    plan: TrainingPlan,
    max_length: int,
    losses: dict[str, RecordLosses],
    on_progress: Progress,
) -> ArmRun:
    """One training and its evaluation; the records' losses are added to those of the others."""
    request, seed = request_for(laboratory, plan), plan.trial_config.seed
    on_progress(ProgressEvent(f"{shown(arm.changed)}, seed {seed}", 0, None, ""))
    try:
        trained = train(laboratory, plan, on_progress=on_progress)
        report = evaluate(
            laboratory, request.adapter_dir, run_id=request.run_id, max_length=max_length, on_progress=on_progress
        )
    except (TrainingError, ArtifactError) as error:
        return ArmRun(seed=seed, run_id=request.run_id, reason=error.what)
    losses[request.run_id] = read_losses(report.path)
    return ArmRun(
        seed=seed,
        run_id=request.run_id,
        loss=report.eval_loss,
        adapter=request.adapter_dir,
        adapter_hash=report.adapter_hash,
        evaluation=report.path,
        evaluation_sha256=sha256_file(report.path / "report.json"),
        gpu_hours=trained.hours,
    )
