"""What going on from a champion costs in what it knew, beside training from scratch."""

from typing import Any

import dagster as dg
from pydantic import Field

from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.search.continual.comparison import ContinualResult, ContinualSpec
from finetune.search.spec import spec_of
from lora_assets.assets.common import (
    PROTOCOL,
    SETTINGS,
    log_progress,
    made_of,
    path,
    picture,
    refuse_base_model,
    table,
)
from resources.base_model import BaseModelSource
from resources.retries import no_retry_if_permanent
from resources.run_log import RunLog

_DEFAULTS = ContinualSpec()


class ContinualConfig(dg.PermissiveConfig):
    """What is compared (docs/search.md): the fields below, and `fixed`, `method`, `task`."""

    goal: str = Field("", description="What it is for, in a sentence.")
    version: str | None = Field(None, description="Such as v3; unset: the last champion of an earlier date.")
    replay_fraction: float = Field(
        SETTINGS.replay_fraction, description="Share of records that the version knows, of all that are trained on."
    )
    without_replay: bool = Field(_DEFAULTS.without_replay, description="Go on without replay, too.")
    seed: int = Field(SETTINGS.seed, description="Seed of the bootstrap.")
    dry_run: bool = Field(False, description="Plan and price the trainings; train nothing.")


@dg.asset(
    **PROTOCOL,
    kinds={"pytorch", "html"},
    description="Going on from the champion of an earlier date, with replay and without, beside training from scratch: "
    "losses on old and new data, and what was forgotten; started by hand. INIT_FROM=champion trains so.",
)
@no_retry_if_permanent()
def continual_report(
    context: dg.AssetExecutionContext,
    config: ContinualConfig,
    merged_dataset: PreparedDataset,
    dataset_profile: DatasetProfile,
    base_model: BaseModelSource,
    run_log: RunLog,
) -> dg.MaterializeResult[ContinualResult]:
    """Train what is missing, evaluate everything on the same records, report."""
    from lora_assets.continual import of_settings, propose, run_continual
    from lora_assets.laboratory import Laboratory, bench_of

    report = log_progress(context)
    given = {name: value for name, value in config.model_dump().items() if value is not None}
    spec = spec_of({**given, "dataset_date": context.partition_key}, ContinualSpec, where="run config")
    refuse_base_model(spec)
    spec = of_settings(spec, SETTINGS)
    base = base_model.resolve(report, weights=not spec.dry_run or base_model.is_local)
    bench = bench_of(SETTINGS, merged_dataset, dataset_profile, base)
    if spec.dry_run:
        measured = bench.measured(run_log.measurements(base.name, bench.device))
        result = propose(SETTINGS, spec, measured)
    else:
        laboratory = Laboratory(bench, SETTINGS, run_log, "continual", context.run.run_id)
        result = run_continual(laboratory, spec, report)
    return dg.MaterializeResult(value=result, metadata=_told(result))


def _told(result: ContinualResult) -> dict[str, Any]:
    from finetune.search.continual.report import CAPTIONS

    arms = [
        {
            "model": arm.name,
            **{f"loss on {part} data": loss for part, loss in arm.loss.items()},
            **arm.model_dump(include={"records", "steps", "tokens", "gpu_hours", "run_id"}),
        }
        for arm in result.arms
    ]
    told = {
        "status": result.status,
        "conclusion": result.conclusion,
        "starts_from": result.version,
        "new_records": result.trained_new,
        "replayed_records": result.trained_replayed,
        "models": table(arms),
    }
    if result.path is None:
        return told
    changes = [
        {
            **change.model_dump(include={"arm", "against", "part", "change"}),
            "low": change.ci95[0],
            "high": change.ci95[1],
            "shown": change.shown,
        }
        for change in result.changes
    ]
    return {
        **told,
        "path": path(result.path),
        "report": path(result.path / "report.html"),
        "forgetting": result.forgetting.change if result.forgetting else 0.0,
        "changes": table(changes),
        "reused": result.reused,
        **made_of(result.path),
        **{file.removesuffix(".png"): picture((result.path / file).read_bytes()) for file in CAPTIONS},
    }
