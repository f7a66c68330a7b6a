"""Several adapters combined into one, published if that is better than the best of them."""

import dagster as dg
from pydantic import Field

from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.search.ensemble.result import EnsembleResult
from finetune.search.ensemble.spec import EnsembleSpec
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


class EnsembleConfig(dg.PermissiveConfig):
    """An ensemble (docs/search.md): the fields below, and `ranks`, `fixed`, `task`, `density`, `temperature`, ..."""

    goal: str = Field("", description="What the ensemble is for, in a sentence.")
    diversity: str = Field("seeds", description="In what the members differ: seeds, ranks or folds.")
    n_members: int | None = Field(None, description="How many; 4 unless ranks are given.")
    weighting: str = Field("greedy_soup", description="uniform, inverse_loss, softmax_loss or greedy_soup.")
    combination: str = Field(
        "cat", description="PEFT's method: cat, linear, svd, ties, dare_linear, ... (docs/search.md)."
    )
    seed: int = Field(SETTINGS.seed, description="Of the first member, and of everything random.")
    dry_run: bool = Field(False, description="Plan and price all members; train nothing.")


@dg.asset(
    **PROTOCOL,
    kinds={"huggingface", "pytorch"},
    description="Diverse adapters combined into one by PEFT, and published if it is better than the best of them; "
    "started by hand. The report is there either way.",
)
@no_retry_if_permanent()
def ensemble_adapter(
    context: dg.AssetExecutionContext,
    config: EnsembleConfig,
    merged_dataset: PreparedDataset,
    dataset_profile: DatasetProfile,
    base_model: BaseModelSource,
    run_log: RunLog,
) -> dg.MaterializeResult[EnsembleResult]:
    """A restarted run repeats no training: members are named by what they are made of."""
    from lora_assets.ensembles import propose, run_ensemble
    from lora_assets.laboratory import Laboratory, bench_of

    given = {name: value for name, value in config.model_dump().items() if value is not None}
    spec = spec_of(
        {"task": SETTINGS.training_task, **given, "dataset_date": context.partition_key},
        EnsembleSpec,
        where="run config",
    )
    refuse_base_model(spec)
    base = base_model.resolve(log_progress(context), weights=not spec.dry_run)
    bench = bench_of(SETTINGS, merged_dataset, dataset_profile, base)
    if spec.dry_run:
        result = propose(spec, bench.measured(run_log.measurements(base.name, bench.device)))
        return _shown(result)
    name = spec.name(merged_dataset.fingerprint, base.fingerprint)
    context.log.info(name)
    laboratory = Laboratory(bench, SETTINGS, run_log, name, context.run.run_id)
    result = run_ensemble(laboratory, spec, log_progress(context))
    context.log.info(f"{result.status.replace('_', ' ')}: {result.reason}")
    return _shown(result)


def _shown(result: EnsembleResult) -> dg.MaterializeResult[EnsembleResult]:
    from finetune.search.ensemble.report import CAPTIONS

    metadata: dict[str, dg.MetadataValue | dg.RawMetadataValue] = {
        "status": result.status,
        "reason": result.reason,
        "members": table([_row(result, index) for index in range(len(result.members))]),
    }
    if result.gpu_hours is not None:
        metadata["gpu_hours"] = result.gpu_hours
    if result.price is not None:
        metadata["price"] = result.price
    if result.adapter_path:
        metadata["adapter"] = path(result.adapter_path)
    if result.verdict and result.verdict.delta is not None:
        metadata["delta_vs_best_member"] = result.verdict.delta
    if result.path:
        metadata["ensemble"] = result.name
        metadata |= {"path": path(result.path), "report": path(result.path / "report.html"), "reused": result.reused}
        metadata |= made_of(result.path)
        pictures = [result.path / file for file in CAPTIONS if (result.path / file).exists()]
        metadata |= {file.stem: picture(file.read_bytes()) for file in pictures}
    return dg.MaterializeResult(value=result, metadata=metadata)


def _row(result: EnsembleResult, index: int) -> dict[str, str | int | float | bool | None]:
    member = result.members[index]
    figures = member.evaluated.figures if member.evaluated else None
    return {
        "member": member.name,
        "weight": member.weight if figures else None,
        "selection_loss": figures.selection_loss if figures else None,
        "judging_loss": figures.judging_loss if figures else None,
        "steps": member.training_steps,
        "gpu_hours": member.gpu_hours,
        "price": member.price,
        "run": member.run_id,
        "fault": member.fault,
    }
