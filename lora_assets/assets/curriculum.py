"""One adapter carried through named stages, compared with the same data shuffled."""

from typing import Any

import dagster as dg
from pydantic import Field

from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.search.curriculum.spec import CurriculumSpec
from finetune.search.models import StepResult
from finetune.search.spec import spec_of
from lora_assets.assets.common import (
    PROTOCOL,
    SETTINGS,
    log_progress,
    made_of,
    path,
    picture,
    published_files,
    refuse_base_model,
    table,
)
from resources.base_model import BaseModelSource
from resources.retries import no_retry_if_permanent
from resources.run_log import RunLog

# Plain values: of a list of configs Dagster takes no other default.
_THIRDS: Any = [{"name": "first"}, {"name": "second"}, {"name": "third"}]


class StageConfig(dg.Config):
    """One stage; `files` or `exports` where the stages are not made by difficulty."""

    name: str = Field(description="Its name, for people.")
    files: list[str] = Field([], description="Whole paths of JSONL files of records.")
    exports: list[str] = Field(
        default=[], description="Names of exports of the date, whose training records are taken."
    )
    share: float | None = Field(
        default=None, description="Of the records, by difficulty; equal shares where none says."
    )
    epochs: float | None = Field(None, description="Passes over its records; unset: the plan's.")
    learning_rate: float | None = Field(None, description="Peak learning rate; unset: the plan's.")
    replay: float = Field(0.0, description="Share of the records of all earlier stages that are mixed in.")


class CurriculumConfig(dg.PermissiveConfig):
    """A curriculum (docs/search.md): the fields below, and `fixed`, `task`, `tokens_per_second`."""

    goal: str = Field("", description="What it is for, in a sentence.")
    stages: list[StageConfig] = Field(_THIRDS, description="In order; two or more.")
    by: str | None = Field("length", description="length, base_loss or score; null where stages name files or exports.")
    score: str | None = Field(None, description="Column of by: score, or its path such as meta.quality.")
    descending: bool = Field(False, description="The highest first.")
    method: str | None = Field(SETTINGS.training_method, description="lora, qlora, prefix or ia3; unset: the plan's.")
    dry_run: bool = Field(False, description="Price all trainings; train nothing.")


@dg.asset(
    **PROTOCOL,
    kinds={"pytorch", "huggingface"},
    description="One adapter carried through named stages (by difficulty, exports or files), compared with the same "
    "data shuffled at as many steps; started by hand. It is published whatever the outcome, and never champion.",
)
@no_retry_if_permanent()
def curriculum_adapter(
    context: dg.AssetExecutionContext,
    config: CurriculumConfig,
    merged_dataset: PreparedDataset,
    dataset_profile: DatasetProfile,
    base_model: BaseModelSource,
    run_log: RunLog,
) -> dg.MaterializeResult[StepResult]:
    """Train all stages and the shuffled data, or take what was made before."""
    from lora_assets.curriculum import open_curriculum, price_curriculum, run_curriculum
    from lora_assets.laboratory import bench_of

    report = log_progress(context)
    spec = spec_of(
        {"task": SETTINGS.training_task, **config.model_dump(), "dataset_date": context.partition_key},
        CurriculumSpec,
        where="run config",
    )
    refuse_base_model(spec)
    # A local model is known by its weights, and so are the losses that were measured with it.
    base = base_model.resolve(report, weights=not spec.dry_run or base_model.is_local)
    bench = bench_of(SETTINGS, merged_dataset, dataset_profile, base)
    bench = bench.measured(run_log.measurements(base.name, bench.device))
    curriculum = open_curriculum(SETTINGS, spec, bench, report)
    context.log.info(curriculum.name)
    if spec.dry_run:
        priced = price_curriculum(SETTINGS, curriculum, report)
        return dg.MaterializeResult(
            value=priced, metadata={**_told(priced.metadata), "proposed": table(priced.data["proposed"])}
        )
    result = run_curriculum(SETTINGS, curriculum, run_log, report, dagster_run_id=context.run.run_id)
    directory = SETTINGS.layout.experiment(curriculum.name)
    return dg.MaterializeResult(
        value=result,
        data_version=dg.DataVersion(result.metadata["adapter_hash"]),
        metadata={
            "path": path(SETTINGS.layout.adapter(curriculum.name)),
            "report": path(directory / "report.html"),
            "conclusion": result.data["conclusion"],
            **_told(result.metadata),
            **made_of(directory),
            "stages": table([_row(stage) for stage in (*result.data["stages"], result.data["shuffled"])]),
            "files": table([_of_file(file) for file in result.data["files"]]),
            "published": published_files(SETTINGS.layout.adapter(curriculum.name)),
            "held_out": picture((directory / "held_out.png").read_bytes()),
        },
    )


def _told(metadata: dict[str, Any]) -> dict[str, str | int | float]:
    return {
        name: ", ".join(f"{each:+.4f}" for each in value) if isinstance(value, list) else value
        for name, value in metadata.items()
        if value is not None
    }


def _row(stage: dict[str, Any]) -> dict[str, str | int | float | bool | None]:
    shown = ("records", "replayed", "epochs", "learning_rate", "steps", "tokens", "eval_loss", "change", "gpu_hours")
    low, high = stage["change_ci95"]
    return {
        "stage": stage["name"],
        **{name: stage[name] for name in shown},
        "95 % interval of the change": f"{low:+.4f} to {high:+.4f}",
        "run": stage["run_id"],
        "began with": stage["began_with"],
    }


def _of_file(file: dict[str, Any]) -> dict[str, str | int | float | bool | None]:
    return {**file, "held_out_at": ", ".join(file["held_out_at"])}
