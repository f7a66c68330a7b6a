"""Where experiments and protocols train and evaluate: each training is one like any other, and is made once."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.base_model.models import BaseModelRef
from finetune.base_model.resolve import resolve_base_model
from finetune.chat.encode import RecordEncoder
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.dataset.prepare import prepare_dataset
from finetune.dataset.profile import profile_dataset
from finetune.errors import ConfigurationError, DatasetError
from finetune.evaluation.evaluate import evaluate_adapter
from finetune.evaluation.models import EvalReport
from finetune.layout import DataLayout
from finetune.planning.models import TrainingPlan
from finetune.progress import Progress
from finetune.publishing import is_complete, sha256_file, sha256_json
from finetune.search.candidates import Bench
from finetune.search.spec import TrainingSpec
from finetune.training.identity import training_run_id
from finetune.training.models import InitAdapter, TrainingRequest, TrainingResult
from lora_assets.recording import logged_figures, measurement_of, settle
from lora_assets.settings import Settings
from resources.run_log import Recording, RunLog

# Told of an error before it is raised; it may complete the row, which is marked as failed otherwise.
OnError = Callable[[TrainingRequest, Recording, Exception], None]


@dataclass(frozen=True)
class Laboratory:
    """What trainings are made on and logged to.

    Args:
        bench: data, model and machine.
        settings: in force.
        run_log: has a row for every training.
        label: whose trainings these are, such as ``ablation 1a2b3c4d5e6f``: one that is tried again goes on in the row
            of the attempt before.
        dagster_run_id: the Dagster run, if there is one.
        exports: the directory of the dataset's files; the loop's by default.
    """

    bench: Bench
    settings: Settings
    run_log: RunLog
    label: str
    dagster_run_id: str | None = None
    exports: Path | None = None


@dataclass(frozen=True)
class Trained:
    """A training and what became of it."""

    request: TrainingRequest
    result: TrainingResult

    @property
    def hours(self) -> float:
        """What it took in hours of one device, which may be a CPU."""
        return self.result.gpu_hours or self.result.seconds * self.result.processes / 3600


def make_bench(settings: Settings, spec: TrainingSpec, on_progress: Progress, *, weights: bool = False) -> Bench:
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
    """What is trained on, from what is prepared."""
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


def _dataset(settings: Settings, spec: TrainingSpec, on_progress: Progress) -> PreparedDataset:
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


def train(
    laboratory: Laboratory,
    plan: TrainingPlan,
    *,
    dataset: PreparedDataset | None = None,
    init_adapter: InitAdapter | None = None,
    on_progress: Progress,
    on_error: OnError | None = None,
) -> Trained:
    """Train under the training's lease and a row of the run log; what was made before is taken as it is.

    Args:
        laboratory: where.
        plan: what to train.
        dataset: on what; the bench's by default.
        init_adapter: whose weights it begins with; fresh ones by default.
        on_progress: told of the training.
        on_error: told of what the training raises.

    Raises:
        FinetuneError: as trainings raise.
    """
    request = request_for(laboratory, plan, dataset=dataset, init_adapter=init_adapter)
    return Trained(request, _train(laboratory, request, on_progress, on_error))


def request_for(
    laboratory: Laboratory,
    plan: TrainingPlan,
    *,
    dataset: PreparedDataset | None = None,
    init_adapter: InitAdapter | None = None,
) -> TrainingRequest:
    """The training of a plan, named by all that decides its adapter; arguments are those of `train`."""
    bench, settings = laboratory.bench, laboratory.settings
    dataset = dataset or bench.dataset
    run_id = training_run_id(
        date=dataset.date,
        dataset_fingerprint=dataset.fingerprint,
        trial=plan.trial_config,
        base_model=bench.base_model,
        backend="hf-peft",
        init_adapter=init_adapter.adapter_hash if init_adapter else None,
    )
    return TrainingRequest(
        run_id=run_id,
        date=dataset.date,
        dataset=dataset,
        plan=plan,
        base_model=bench.base_model,
        adapter_dir=settings.layout.adapter(run_id),
        work_dir=settings.layout.work(run_id),
        checkpoint_seconds=settings.checkpoint_seconds,
        report_to=settings.report_to,
        processes=1,
        init_adapter=init_adapter,
    )


def _train(
    laboratory: Laboratory, request: TrainingRequest, on_progress: Progress, on_error: OnError | None
) -> TrainingResult:
    from finetune.training.sft import train_adapter

    run_log, exports = laboratory.run_log, laboratory.exports or laboratory.settings.exports
    if not is_complete(request.adapter_dir):
        with run_log.lease(request.run_id, on_progress=on_progress) as lease:
            # Whoever held the lease until now may have finished it.
            if not is_complete(request.adapter_dir):
                with run_log.recording(
                    run_id=request.run_id,
                    dataset_paths=[exports / name for name in request.dataset.records_by_file],
                    base_model=request.base_model.name,
                    backend="hf-peft",
                    date=request.date,
                    dagster_run_id=laboratory.dagster_run_id,
                    dagster_root_run_id=laboratory.label,
                ) as row:
                    try:
                        result = train_adapter(request, on_progress=on_progress, still_mine=lease.still_mine)
                    except Exception as error:
                        if on_error:
                            on_error(request, row, error)
                        raise
                    if measurement := measurement_of(request, result):
                        row.measured(measurement)
                    row.complete(result.adapter_path, logged_figures(result))
                return result
    result = train_adapter(request)
    settle(run_log, request, result, laboratory.label)
    return result


def evaluate(
    laboratory: Laboratory,
    adapter: Path,
    *,
    run_id: str,
    max_length: int,
    dataset: Path | None = None,
    on_progress: Progress,
) -> EvalReport:
    """Evaluate an adapter on held-out records, or take the report that was made of this very evaluation.

    `finetune.evaluation.losses.read_losses` reads each record's losses from the report's directory.

    Args:
        laboratory: where.
        adapter: its directory.
        run_id: the training's id, under which the report is kept.
        max_length: records are cut at so many tokens; what is compared needs the same.
        dataset: held-out records, JSONL; the bench's by default.
        on_progress: told of every batch.

    Raises:
        FinetuneError: as evaluations raise.
    """
    dataset = dataset or laboratory.bench.dataset.eval_path
    return evaluate_adapter(
        base_model=laboratory.bench.base_model,
        adapter_path=adapter,
        dataset=dataset,
        output_dir=evaluation_directory(laboratory.settings.layout, run_id, dataset, max_length),
        run_id=run_id,
        max_length=max_length,
        on_progress=on_progress,
        sample_answers=0,
    )


def evaluation_directory(layout: DataLayout, run_id: str, dataset: Path, max_length: int) -> Path:
    """Where `evaluate` publishes: each set of records and length has its own report, so that none replaces another."""
    return layout.model(run_id, f"trial-{sha256_json([sha256_file(dataset), max_length])[:12]}")
