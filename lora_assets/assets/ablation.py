"""What one value or another of the plan is worth, as an asset."""

from typing import Any

import dagster as dg
from pydantic import Field

from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.search.ablation.report import AblationResult, rows_of
from finetune.search.ablation.spec import AblationSpec, arms_of, dry_run
from finetune.search.models import StepResult
from finetune.search.spec import spec_of
from lora_assets.assets.common import (
    PROTOCOL,
    SETTINGS,
    log_progress,
    made_of,
    path,
    picture,
    table,
)
from resources.base_model import BaseModelSource
from resources.retries import no_retry_if_permanent
from resources.run_log import RunLog


class AblationConfig(dg.Config):
    """An ablation (docs/search.md, Ablation)."""

    goal: str = Field("", description="What the ablation is for, in a sentence.")
    parameters: dict[str, Any] = Field(
        description="Fields of the plan, each with a list of values, such as {lora_rank: [4, 16], use_dora: [true]}."
    )
    method: str = Field("lora", description="lora, qlora, prefix or ia3.")
    fixed: dict[str, Any] = Field(default={}, description="Of the base configuration; the plan chooses the rest.")
    grid: bool = Field(False, description="Vary the parameters together instead of each alone.")
    seeds: int = Field(AblationSpec.model_fields["seeds"].default, description="How often each one is trained.")
    seed: int = Field(SETTINGS.seed, description="The first of the seeds.")
    tokens_per_second: float | None = Field(None, description="Throughput until a training has measured it.")
    dry_run: bool = Field(False, description="Price all trainings; train nothing.")


@dg.asset(
    **PROTOCOL,
    kinds={"pytorch"},
    description="What values of the plan are worth: each trained with several seeds and tested against the base "
    "configuration; started by hand.",
)
def ablation_report(
    context: dg.AssetExecutionContext,
    config: AblationConfig,
    merged_dataset: PreparedDataset,
    dataset_profile: DatasetProfile,
    base_model: BaseModelSource,
    run_log: RunLog,
) -> dg.MaterializeResult[StepResult]:
    """Train what is not trained yet, and report; a restarted run repeats no training."""
    from lora_assets.ablation import run_ablation
    from lora_assets.laboratory import bench_of

    report = log_progress(context)
    with no_retry_if_permanent():
        spec = spec_of(
            {"task": SETTINGS.training_task, **config.model_dump(), "dataset_date": context.partition_key},
            AblationSpec,
            where="run config",
        )
        base = base_model.resolve(report, weights=not spec.dry_run)
        bench = bench_of(SETTINGS, merged_dataset, dataset_profile, base)
        if spec.dry_run:
            measured = bench.measured(run_log.measurements(base.name, bench.device))
            priced = dry_run(spec, arms_of(spec, measured))
            rows = [{**row, "trial_config": row["trial_config"]["trial_id"]} for row in priced.data["proposed"]]
            return dg.MaterializeResult(value=priced, metadata={**_told(priced), "proposed": table(rows)})
        result = run_ablation(spec, bench, SETTINGS, run_log, report, dagster_run_id=context.run.run_id)
    found = AblationResult.model_validate(result.data)
    directory = SETTINGS.layout.experiment(found.name)
    return dg.MaterializeResult(
        value=result,
        metadata={
            "path": path(directory),
            "report": path(directory / "report.html"),
            **_told(result),
            **made_of(directory),
            "configurations": table(rows_of(found)),
            **{file.stem: picture(file.read_bytes()) for file in sorted(directory.glob("*.png"))},
        },
    )


def _told(result: StepResult) -> dict[str, str | int | float]:
    told = {name: value for name, value in result.metadata.items() if value is not None}
    return {**told, "log": result.output_text}
