"""The search for the best adapter that a budget buys, as one asset of several steps."""

from collections.abc import Iterator

import dagster as dg
from pydantic import BaseModel, Field

from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.search.candidates import Bench, experiment_space
from finetune.search.models import StepResult, TrialRecord
from finetune.search.result import shown
from finetune.search.spec import ExperimentSpec, spec_of
from lora_assets.assets.common import (
    COMMON,
    SETTINGS,
    TRAINS_HERE,
    log_progress,
    made_from,
    made_of,
    path,
    picture,
    refuse_base_model,
    table,
)
from lora_assets.kubernetes import convert_step, gpu_step
from resources.base_model import BaseModelSource
from resources.retries import RETRY_POLICY, no_retry_if_permanent
from resources.study import StudyStore

_DEFAULTS = ExperimentSpec()


class ExperimentConfig(dg.PermissiveConfig):
    """An experiment (docs/search.md): the fields below, and `search_space`, `parameters`, `fixed`, `task`, ..."""

    goal: str = Field("", description="What the experiment is for, in a sentence.")
    max_trials: int = Field(_DEFAULTS.max_trials, description="Trials that may start, failed ones apart.")
    budget_gpu_hours: float = Field(_DEFAULTS.budget_gpu_hours, description="Hours of one device, of all trials.")
    methods: list[str] = Field(list(_DEFAULTS.methods), description="lora, qlora, prefix, ia3: one or several.")
    strategy: str = Field(_DEFAULTS.strategy, description="random, bayesian, bandit or halving.")
    stop_metric: str = Field(_DEFAULTS.stop_metric, description="eval_loss, eval_perplexity or delta_vs_base_loss.")
    stop_threshold: float | None = Field(None, description="A result as low as this ends the experiment.")
    stop_patience: int | None = Field(
        _DEFAULTS.stop_patience, description="So many completed trials without a better result end it."
    )
    max_loop_iterations: int = Field(_DEFAULTS.max_loop_iterations, description="Starts of trials, whatever comes.")
    workers: int = Field(1, description="Steps that work on trials side by side; on Kubernetes each has its own GPU.")
    seed: int = Field(SETTINGS.seed, description="Seed of everything random.")
    dry_run: bool = Field(False, description="Propose and price all trials; train nothing.")
    auto_merge: bool = Field(False, description="Merge the best adapter into its base model.")
    merge_format: str = Field(_DEFAULTS.merge_format, description="safetensors, gguf or pytorch.")


class Study(BaseModel):
    """What the first step hands to the others; a dry run is done already."""

    experiment: str
    proposed: StepResult | None = None


class Seat(BaseModel):
    """One worker's place in an experiment."""

    experiment: str
    index: int


@dg.op(
    out={"study": dg.Out(Study), "seats": dg.DynamicOut(Seat)},
    retry_policy=RETRY_POLICY,
    description="Open the experiment, or find it begun, and seat its workers.",
)
def open_study(
    context: dg.AssetExecutionContext,
    config: ExperimentConfig,
    merged_dataset: PreparedDataset,
    dataset_profile: DatasetProfile,
    base_model: BaseModelSource,
    studies: StudyStore,
) -> Iterator[dg.Output[Study] | dg.DynamicOutput[Seat]]:
    """A restarted run goes on with the same experiment: its name is that of what it tries."""
    from finetune.search.dry_run import dry_run
    from lora_assets.experiments import open_experiment

    with no_retry_if_permanent():
        given = {name: value for name, value in config.model_dump().items() if value is not None}
        unset = {name: None for name in ("stop_threshold", "stop_patience") if name not in given}
        spec = spec_of(
            {"task": SETTINGS.training_task, **given, **unset, "dataset_date": context.partition_key},
            ExperimentSpec,
            where="run config",
        )
        refuse_base_model(spec)
        bench = _bench(context, merged_dataset, dataset_profile, base_model, weights=False)
        if spec.dry_run:
            measured = bench.measured(studies.measurements(bench.base_model.name, bench.device))
            yield dg.Output(
                Study(experiment="", proposed=dry_run(spec, measured, experiment_space(spec, measured))), "study"
            )
            return
        name = open_experiment(studies, spec, bench, SETTINGS).experiment.name
    context.log.info(f"experiment {name}")
    yield dg.Output(Study(experiment=name), "study")
    for index in range(spec.workers):
        yield dg.DynamicOutput(Seat(experiment=name, index=index), str(index), "seats")


@dg.op(
    out=dg.Out(dg.Nothing),
    pool="gpu" if TRAINS_HERE else None,
    tags=gpu_step(SETTINGS) if TRAINS_HERE else None,
    retry_policy=RETRY_POLICY,
    description="Ask, train, evaluate, tell, until the experiment is over.",
)
def work_on_trials(
    context: dg.AssetExecutionContext,
    seat: Seat,
    merged_dataset: PreparedDataset,
    dataset_profile: DatasetProfile,
    base_model: BaseModelSource,
    studies: StudyStore,
) -> None:
    """One worker; each trial is logged like any training."""
    from lora_assets.experiments import Opened, own_gpu, run_worker

    own_gpu(seat.index)
    with no_retry_if_permanent():
        bench = _bench(context, merged_dataset, dataset_profile, base_model, weights=True)
        experiment = studies.find_experiment(seat.experiment)
        run_worker(Opened(experiment, bench, SETTINGS, context.run.run_id), log_progress(context))


@dg.op(
    out=dg.Out(StepResult),
    ins={"worked": dg.In(dg.Nothing)},
    tags=convert_step(SETTINGS),
    retry_policy=RETRY_POLICY,
    description="Merge the best adapter where that is wanted, and publish the report.",
)
def report_study(
    context: dg.AssetExecutionContext,
    study: Study,
    merged_dataset: PreparedDataset,
    dataset_profile: DatasetProfile,
    base_model: BaseModelSource,
    studies: StudyStore,
) -> dg.Output[StepResult]:
    """What the experiment found, for a person and for the next plan."""
    from finetune.search.report import CAPTIONS
    from lora_assets.experiments import Opened, conclude

    if study.proposed is not None:
        rows = [{**row, "params": str(row["params"])} for row in study.proposed.data["proposed"]]
        return dg.Output(study.proposed, metadata={**_told(study.proposed), "proposed": table(rows)})
    with no_retry_if_permanent():
        experiment = studies.find_experiment(study.experiment)
        bench = _bench(context, merged_dataset, dataset_profile, base_model, weights=experiment.spec.auto_merge)
        result = conclude(Opened(experiment, bench, SETTINGS), log_progress(context))
    directory = SETTINGS.layout.experiment(experiment.name)
    pictures = {file: directory / file for file in CAPTIONS if (directory / file).exists()}
    return dg.Output(
        result,
        metadata={
            "path": path(directory),
            "report": path(directory / "report.html"),
            "experiment": experiment.name,
            **made_of(directory),
            "stopped_by": str(result.data["stopped_by"]),
            **_told(result),
            "budget_gpu_hours": experiment.spec.budget_gpu_hours,
            "trials": table([_row(trial) for trial in experiment.history()]),
            "search_space": dg.MetadataValue.json({name: str(span) for name, span in experiment.space.items()}),
            **{file.removesuffix(".png"): picture(where.read_bytes()) for file, where in pictures.items()},
        },
    )


@dg.graph_asset(
    key_prefix=COMMON["key_prefix"],
    partitions_def=COMMON["partitions_def"],
    owners=COMMON["owners"],
    ins=made_from("merged_dataset", "dataset_profile"),
    group_name="research",
    code_version="1",
    kinds={"optuna", "pytorch"},
    description="The best adapter that a budget buys: trials proposed by Optuna, trained and evaluated by workers side "
    "by side; started by hand. The next plan adopts the best with ADOPT_TRIAL.",
)
def hpo_study(merged_dataset: PreparedDataset, dataset_profile: DatasetProfile) -> StepResult:
    """Open the experiment, let its workers work, report."""
    study, seats = open_study(merged_dataset, dataset_profile)
    worked = seats.map(lambda seat: work_on_trials(seat, merged_dataset, dataset_profile))
    return report_study(study, merged_dataset, dataset_profile, worked=worked.collect())  # type: ignore[no-any-return]


def _bench(
    context: dg.AssetExecutionContext,
    dataset: PreparedDataset,
    profile: DatasetProfile,
    base_model: BaseModelSource,
    *,
    weights: bool,
) -> Bench:
    from lora_assets.laboratory import bench_of

    # A local model is known by its weights, and so are the experiment and its trainings.
    base = base_model.resolve(log_progress(context), weights=weights or base_model.is_local)
    return bench_of(SETTINGS, dataset, profile, base)


def _told(result: StepResult) -> dict[str, str | int | float]:
    told = {name: value for name, value in result.metadata.items() if value is not None}
    return {**told, "log": result.output_text}


def _row(trial: TrialRecord) -> dict[str, str | int | float | bool | None]:
    return {
        "trial": trial.number,
        "state": trial.state,
        "result": trial.value,
        "seconds": 3600 * trial.gpu_hours,
        "configuration": shown(trial),
        "run": trial.run_id,
        "why it ended": trial.reason,
        "started": trial.attempts,
    }
