"""From a profile to a plan, and from there to an adapter."""

import math
import time
from functools import partial

import dagster as dg
from pydantic import Field

from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.errors import StoppedError
from finetune.planning.cost import refuse_above
from finetune.planning.models import Method, Task, TrainingPlan
from finetune.planning.overrides import PlanOverrides
from finetune.planning.plan import make_plan
from finetune.progress import Progress, ProgressEvent
from finetune.publishing import is_complete
from finetune.search.adoption import as_overrides, read_configuration
from finetune.training.continuation import init_adapter_of
from finetune.training.identity import training_run_id
from finetune.training.models import TrainingRequest, TrainingResult
from finetune.training.ownership import StillMine
from lora_assets.assets.common import (
    COMMON,
    SETTINGS,
    TRAINS_HERE,
    choice,
    log_progress,
    made_from,
    path,
    picture,
    published_files,
    table,
)
from lora_assets.cancellation import cancel_experiment
from lora_assets.kubernetes import gpu_step
from lora_assets.logs import TAGS
from lora_assets.recording import logged_figures, measurement_of, settle
from lora_assets.start import with_start
from resources.artifact_store import ArtifactStore
from resources.base_model import BaseModelSource
from resources.retries import no_retry_if_permanent
from resources.run_log import RunLog
from resources.trainer import LoraTrainer
from sensors.run_failure import CANCELLED

# Time between two looks at a running training that stay on its asset.
SECONDS_BETWEEN_OBSERVATIONS = 30.0


class PlanConfig(dg.Config):
    """What the plan may not choose; what is left out, it chooses. The defaults are the environment's."""

    method: str | None = Field(
        SETTINGS.training_method,
        description="lora, qlora (4-bit base), prefix or ia3; unset: lora, or qlora where lora does not fit.",
    )
    task: str = Field(SETTINGS.training_task, description="instruction, domain, chat or style.")
    lora_rank: int | None = Field(SETTINGS.lora_rank, description="Rank of the adapter.")
    epochs: float | None = Field(SETTINGS.train_epochs, description="Passes over the data.")
    learning_rate: float | None = Field(SETTINGS.learning_rate, description="Peak learning rate.")
    max_length: int | None = Field(SETTINGS.max_length, description="Tokens per record.")
    micro_batch: int | None = Field(SETTINGS.micro_batch, description="Records per forward pass.")
    accumulation: int | None = Field(SETTINGS.accumulation, description="Forward passes per optimizer step.")
    vram_limit_gb: float | None = Field(SETTINGS.vram_limit_gb, description="Memory of the card in GB.")
    seed: int = Field(SETTINGS.seed, description="Seed of everything random.")
    adopt_trial: str | None = Field(
        SETTINGS.adopt_trial,
        description="SHA-256 of an experiment's best configuration: the plan is that one, whatever else is given.",
    )
    init_from: str = Field(
        SETTINGS.init_from,
        description="base: the base model alone; champion: the last champion of an earlier date, or that version (v3).",
    )
    replay_fraction: float = Field(
        SETTINGS.replay_fraction, description="Share of records that the version to start from knows already."
    )


@dg.asset(
    **COMMON,
    ins=made_from("dataset_profile", "merged_dataset"),
    group_name="training",
    kinds={"python"},
    code_version="1",
    description="Trial configuration, search space and memory estimate, each choice with its reason.",
)
@no_retry_if_permanent()
def training_plan(
    context: dg.AssetExecutionContext,
    config: PlanConfig,
    dataset_profile: DatasetProfile,
    merged_dataset: PreparedDataset,
    base_model: BaseModelSource,
    run_log: RunLog,
) -> dg.MaterializeResult[TrainingPlan]:
    """Choose what the configuration leaves open, and say why; earlier trainings of the model correct the estimates.

    With INIT_FROM=champion the plan also says which version the training goes on with, and on which records.
    """
    task, method, overrides = _given(config)
    # A plan needs no weights; but only they tell whether a local model is the one that a champion was trained on.
    weights = config.init_from != "base" and base_model.is_local
    base = base_model.resolve(log_progress(context), weights=weights)
    plan_for = partial(
        make_plan,
        base.path,
        task=task,
        vram_limit_gb=config.vram_limit_gb,
        device=SETTINGS.device,
        history=run_log.measurements(base.name, SETTINGS.device),
        stated_tokens_per_second=SETTINGS.tokens_per_second,
        price_per_gpu_hour=SETTINGS.gpu_hour_price,
    )
    plan = plan_for(dataset_profile, method=method, overrides=overrides)
    if config.init_from != "base":
        plan = with_start(
            SETTINGS,
            plan,
            dataset=merged_dataset,
            base_model=base,
            init_from=config.init_from,
            replay_fraction=config.replay_fraction,
            method=method,
            overrides=overrides,
            make_plan=plan_for,
        )
    trial, memory, cost = plan.trial_config, plan.memory_estimate, plan.cost
    return dg.MaterializeResult(
        value=plan,
        data_version=dg.DataVersion("-".join([trial.trial_id, *_of_start(plan)])),
        metadata={
            "trial_id": trial.trial_id,
            "adopted": config.adopt_trial or "",
            **_told_of_start(plan),
            "trial_config": dg.MetadataValue.json(trial.model_dump()),
            "search_space": dg.MetadataValue.json({name: r.model_dump() for name, r in plan.search_space.items()}),
            "vram_gb": memory.vram_gb,
            "fits": "unknown: no VRAM_LIMIT_GB" if memory.fits is None else str(memory.fits),
            "model_params": memory.model_params,
            "trainable_params": memory.trainable_params,
            "memory_parts": table([{"part": name, "gb": value} for name, value in memory.parts.items()]),
            "estimated_steps": plan.estimated_steps,
            "estimated_tokens": plan.estimated_tokens or 0,
            "estimated_gpu_hours": "unknown" if cost is None or cost.gpu_hours is None else cost.gpu_hours,
            "estimated_price": "unknown" if cost is None or cost.price is None else cost.price,
            "throughput": "unknown" if cost is None else cost.throughput,
            "max_gpu_hours": "no limit" if SETTINGS.max_gpu_hours is None else SETTINGS.max_gpu_hours,
            "why": dg.MetadataValue.md("\n".join(f"- {line}" for line in plan.explanations)),
        },
    )


def _given(config: PlanConfig) -> tuple[Task, Method | None, PlanOverrides]:
    """What the plan may not choose: the adopted configuration as a whole, or what the run's configuration names.

    Raises:
        ConfigurationError: no such configuration was kept, or a name is none of those allowed.
        ArtifactError: it was altered since.
    """
    if config.adopt_trial:
        trial = read_configuration(SETTINGS.layout.configurations, config.adopt_trial)
        method, overrides = as_overrides(trial)
        return trial.task, method, overrides
    given = config.model_dump(include=set(PlanOverrides.model_fields))
    return (
        choice(Task, "task", config.task),
        None if config.method is None else choice(Method, "method", config.method),
        PlanOverrides.model_validate(given),
    )


def _of_start(plan: TrainingPlan) -> list[str]:
    """What tells plans of one configuration apart that begin with, or go on with, different things."""
    return [plan.continued.adapter_hash[:10], plan.continued.dataset.fingerprint] if plan.continued else []


def _told_of_start(plan: TrainingPlan) -> dict[str, str | int]:
    if plan.continued is None:
        return {"starts_from": "the base model"}
    return {
        "starts_from": plan.continued.version,
        "new_records": plan.continued.new_records,
        "replayed_records": plan.continued.replayed_records,
    }


@dg.asset(
    **COMMON,
    ins=made_from("merged_dataset", "training_plan"),
    group_name="training",
    kinds={"pytorch", "huggingface"} if TRAINS_HERE else {"h2o"},
    code_version="1",
    # Waiting for another machine's GPU takes none here.
    pool="gpu" if TRAINS_HERE else None,
    op_tags=gpu_step(SETTINGS, SETTINGS.train_processes or 1) if TRAINS_HERE else None,
    description="The LoRA adapter with its model card, loss curve and training log; trained here with PEFT or "
    "delegated to H2O LLM Studio, by TRAINING_BACKEND.",
)
def adapter(
    context: dg.AssetExecutionContext,
    merged_dataset: PreparedDataset,
    training_plan: TrainingPlan,
    base_model: BaseModelSource,
    trainer: LoraTrainer,
    store: ArtifactStore,
    run_log: RunLog,
) -> dg.MaterializeResult[TrainingResult]:
    """Train, or take the adapter that this very training made before."""
    report = log_progress(context)
    with no_retry_if_permanent():
        # A repository's commit tells its weights, which are needed where they are trained.
        base = base_model.resolve(report, weights=TRAINS_HERE or base_model.is_local)
    continued = training_plan.continued
    dataset = continued.dataset if continued else merged_dataset
    run_id = training_run_id(
        date=context.partition_key,
        dataset_fingerprint=dataset.fingerprint,
        trial=training_plan.trial_config,
        base_model=base,
        backend=trainer.backend,
        init_adapter=continued.adapter_hash if continued else None,
    )
    request = TrainingRequest(
        run_id=run_id,
        date=context.partition_key,
        dataset=dataset,
        plan=training_plan,
        base_model=base,
        adapter_dir=store.layout.adapter(run_id),
        work_dir=store.layout.work(run_id),
        init_adapter=init_adapter_of(training_plan),
        checkpoint_seconds=SETTINGS.checkpoint_seconds,
        report_to=SETTINGS.report_to,
        processes=SETTINGS.train_processes,
        sharding=SETTINGS.train_sharding,
    )
    with no_retry_if_permanent():
        result = _train(context, trainer, run_log, request, report)
    return dg.MaterializeResult(
        value=result,
        data_version=dg.DataVersion(result.adapter_hash or run_id),
        metadata={
            "path": path(request.adapter_dir),
            "run_id": run_id,
            "status": result.status,
            "adapter_path": path(request.adapter_dir),
            "adapter_hash": result.adapter_hash or "",
            "backend": result.backend,
            "training": trainer.label,
            "external_run_id": result.external_run_id or "",
            **experiment_link(result.external_run_url),
            "training_steps": result.training_steps,
            "final_loss": result.final_loss or 0.0,
            "gpu_hours": result.gpu_hours,
            "seconds": result.seconds,
            "tokens_seen": result.tokens_seen or 0,
            "tokens_per_second": result.tokens_per_second or 0.0,
            "peak_memory_gb": result.peak_memory_gb or 0.0,
            "micro_batch": result.micro_batch or 0,
            "out_of_memory_with": ", ".join(map(str, result.out_of_memory)) or "no micro-batch",
            **_told_of_start(training_plan),
            "base_model": base.name,
            "base_model_fingerprint": base.fingerprint,
            "published": published_files(request.adapter_dir),
            "loss_curve": picture((request.adapter_dir / "loss_curve.png").read_bytes()),
            "reused": result.reused,
        },
    )


def _train(
    context: dg.AssetExecutionContext,
    trainer: LoraTrainer,
    run_log: RunLog,
    request: TrainingRequest,
    report: Progress,
) -> TrainingResult:
    """Train under the training's lease, so that of several processes that were started for it one trains."""
    if not is_complete(request.adapter_dir):
        refuse_above(request.plan, SETTINGS.max_gpu_hours)
        with run_log.lease(request.run_id, on_progress=report) as lease:
            # Whoever held the lease until now may have finished it.
            if not is_complete(request.adapter_dir):
                return _train_recorded(context, trainer, run_log, request, report, lease.still_mine)
    result = trainer.train(request, on_progress=report, on_external_run=lambda run, url: None)
    settle(run_log, request, result, context.run.get_root_run_id())
    return result


def _train_recorded(
    context: dg.AssetExecutionContext,
    trainer: LoraTrainer,
    run_log: RunLog,
    request: TrainingRequest,
    report: Progress,
    still_mine: StillMine,
) -> TrainingResult:
    """Train under a row of the run log; an adapter that is there already is no training and gets no row."""
    with run_log.recording(
        run_id=request.run_id,
        dataset_paths=[SETTINGS.exports / name for name in request.dataset.records_by_file],
        base_model=request.base_model.name,
        backend=trainer.backend,
        date=request.date,
        dagster_run_id=context.run.run_id,
        dagster_root_run_id=context.run.get_root_run_id(),
    ) as row:
        # What a person reads in the UI's list of runs.
        context.instance.add_run_tags(context.run.run_id, {"training": trainer.label})

        def external_run(external_run_id: str, url: str) -> None:
            row.external_run(external_run_id, url)
            context.instance.add_run_tags(context.run.run_id, {"external_run_id": external_run_id})
            context.log.info(f"{trainer.label}: {url}")
            # What a person sees on the asset while there is no materialization yet.
            context.log_event(
                dg.AssetObservation(
                    context.asset_key,
                    partition=request.date,
                    metadata={
                        "training": trainer.label,
                        "external_run_id": external_run_id,
                        **experiment_link(url),
                    },
                )
            )

        try:
            result = trainer.train(
                request,
                on_progress=_observed(context, request.date, report),
                on_external_run=external_run,
                still_mine=still_mine,
            )
        except StoppedError as error:
            run_log.fail(row.id, str(error))
            if TAGS.items() <= context.run.tags.items():
                # As below; a checkpoint was saved.
                raise dg.Failure(str(error), allow_retries=False) from error
            raise
        except dg.DagsterExecutionInterruptedError:
            run = context.instance.get_run_by_id(context.run.run_id)
            # Any other interrupt (a drained node) is followed by an attempt that finds the experiment again.
            if run and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED):
                said = CANCELLED if TRAINS_HERE else cancel_experiment(trainer, request.run_id, request.work_dir)
                run_log.fail(row.id, said)
            else:
                run_log.fail(row.id, "the step was interrupted")
            if run and TAGS.items() <= run.tags.items():
                # Ctrl-C on a command means it: the retry policy would begin again.
                raise dg.Failure("interrupted", allow_retries=False) from None
            raise
        if measurement := measurement_of(request, result):
            row.measured(measurement)
        row.complete(result.adapter_path, logged_figures(result))
    return result


def _observed(context: dg.AssetExecutionContext, date: str, report: Progress) -> Progress:
    """A listener that also puts the figures of a local training on the asset while it runs."""
    last = -math.inf

    def listen(event: ProgressEvent) -> None:
        nonlocal last
        report(event)
        now = time.monotonic()
        if TRAINS_HERE and event.stage == "training" and now - last >= SECONDS_BETWEEN_OBSERVATIONS:
            last = now
            metadata = {"step": event.done, "total_steps": event.total, **event.figures}
            context.log_event(dg.AssetObservation(context.asset_key, partition=date, metadata=metadata))

    return listen


def experiment_link(url: str | None) -> dict[str, dg.MetadataValue[str | None]]:
    """The metadata that leads to a remote experiment, if there is one."""
    return {"experiment": dg.MetadataValue.url(url)} if url else {}
