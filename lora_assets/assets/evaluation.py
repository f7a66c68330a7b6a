"""From an adapter to its evaluation and its version; whether it is exported is decided here."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
from pydantic import Field

from finetune.dataset.models import PreparedDataset
from finetune.evaluation.models import ChampionComparison, EvalReport
from finetune.planning.models import Continued, TrainingPlan
from finetune.registry.champion import decide, rival_on
from finetune.registry.models import RegisteredVersion
from finetune.registry.promotion import champion, promote, settle
from finetune.registry.store import get_version, register_adapter
from finetune.training.models import TrainingResult
from lora_assets.assets.common import (
    COMMON,
    OWNERS,
    PREFIX,
    SETTINGS,
    key,
    log_progress,
    made_from,
    path,
    picture,
    published_files,
    table,
)
from lora_assets.kubernetes import gpu_step
from lora_assets.partitions import dataset_dates
from resources.artifact_store import ArtifactStore
from resources.base_model import BaseModelSource
from resources.retries import RETRY_POLICY, no_retry_if_permanent

# What the registry keeps of an evaluation.
EVALUATED = (
    "eval_loss",
    "eval_perplexity",
    "base_loss",
    "delta_vs_base_loss",
    "token_accuracy",
    "exact_match",
    "base_exact_match",
)
# Of sampled answers with a short reference, where there are any.
OF_ANSWERS = ("exact_match", "base_exact_match", "chrf", "base_chrf")


@dg.asset(
    **COMMON,
    ins=made_from("adapter", "merged_dataset", "training_plan"),
    group_name="training",
    kinds={"pytorch", "html"},
    code_version="1",
    pool="gpu",
    op_tags=gpu_step(SETTINGS),
    description="Base against adapter, and against the reigning champion, on held-out data: JSON, HTML and plots.",
)
@no_retry_if_permanent()
def eval_report(
    context: dg.AssetExecutionContext,
    adapter: TrainingResult,
    merged_dataset: PreparedDataset,
    training_plan: TrainingPlan,
    base_model: BaseModelSource,
    store: ArtifactStore,
) -> dg.MaterializeResult[EvalReport]:
    """Evaluate on the prompts that training never saw."""
    from finetune.evaluation.evaluate import evaluate_adapter
    from finetune.evaluation.tasks import EvalTasks

    report = evaluate_adapter(
        base_model=base_model.resolve(log_progress(context)),
        adapter_path=store.layout.adapter(adapter.run_id),
        dataset=merged_dataset.eval_path,
        output_dir=store.layout.model(adapter.run_id, "evaluation"),
        run_id=adapter.run_id,
        champion=rival_on(merged_dataset, store.layout),
        regressions=SETTINGS.regressions,
        tasks=EvalTasks(SETTINGS.tasks, SETTINGS.eval_tasks_dir),
        max_length=training_plan.trial_config.max_length,
        on_progress=log_progress(context),
    )
    low, high = report.delta_ci95
    return dg.MaterializeResult(
        value=report,
        metadata={
            "path": path(report.path),
            "report": path(report.path / "report.html"),
            "eval_loss": report.eval_loss,
            "eval_perplexity": report.eval_perplexity,
            "base_loss": report.base_loss,
            "delta_vs_base_loss": report.delta_vs_base_loss,
            "delta_ci95": f"{low:.4f} to {high:.4f}",
            "token_accuracy": report.token_accuracy,
            "base_token_accuracy": report.base_token_accuracy,
            **{name: value for name in OF_ANSWERS if (value := getattr(report, name)) is not None},
            "records": report.records,
            "against_champion": _against(report.champion),
            "regressions": f"{report.regressions - len(report.failed_regressions)} of {report.regressions} hold",
            "failed_regressions": table([case.model_dump() for case in report.failed_regressions]),
            "tasks": table([score.model_dump() for score in report.tasks]),
            "answers": table([answer.model_dump() for answer in report.answers]),
            "by_source": table([group.model_dump() for group in report.by_source]),
            "by_length": table([group.model_dump() for group in report.by_length]),
            "got_worse": table([record.model_dump() for record in report.worst]),
            "seconds": report.seconds,
            "published": published_files(report.path),
            "comparison": picture((report.path / "change.png").read_bytes()),
            "reused": report.reused,
        },
    )


def _against(rival: ChampionComparison | None) -> str:
    if rival is None:
        return "no champion to compare"
    change = rival.delta_vs_champion
    told = "no held-out record is left to compare them on" if change is None else f"{change:+.4f}"
    return f"{rival.version}: {told}" + (f"; {rival.caveat}" if rival.caveat else "")


class PromotionConfig(dg.Config):
    """Who becomes champion, and what is exported."""

    promote: bool = Field(False, description="Promote this run's version even if it does not beat the champion.")
    export_version: str | None = Field(
        None, description="Export this registered version (as v3) instead, whoever reigns."
    )


def _continued(continued: Continued) -> dict[str, Any]:
    """What the adapter goes on from, and on what; the dataset that it stands for is the date's whole one."""
    told = continued.model_dump(include={"version", "run_id", "adapter_hash", "new_records", "replayed_records"})
    return {**told, "training_dataset": continued.dataset.fingerprint}


@dg.multi_asset(
    outs={
        "registered_adapter": dg.AssetOut(
            key_prefix=PREFIX,
            dagster_type=RegisteredVersion,
            description="Version vN of the adapter with its SHA-256, lineage and manifest; champion or challenger.",
            kinds={"python"},
            owners=OWNERS,
            group_name="training",
            code_version="1",
        ),
        "promoted_adapter": dg.AssetOut(
            key_prefix=PREFIX,
            dagster_type=RegisteredVersion,
            is_required=False,
            description="The version that is exported: exists only for a champion, or one promoted by hand.",
            kinds={"python"},
            owners=OWNERS,
            group_name="training",
            code_version="1",
        ),
    },
    ins=made_from("adapter", "eval_report", "merged_dataset", "training_plan"),
    partitions_def=dataset_dates,
    can_subset=False,
    retry_policy=RETRY_POLICY,
)
def registered_adapter(
    context: dg.AssetExecutionContext,
    config: PromotionConfig,
    adapter: TrainingResult,
    eval_report: EvalReport,
    merged_dataset: PreparedDataset,
    training_plan: TrainingPlan,
    store: ArtifactStore,
    base_model: BaseModelSource,
) -> Iterator[dg.MaterializeResult[RegisteredVersion]]:
    """Give the adapter its version; hand it on only if it is, or is made, champion."""
    base = base_model.resolve(log_progress(context), weights=False)
    registry, by = store.layout.registry, f"run {context.run.run_id}"
    adapter_hash = eval_report.adapter_hash
    version = register_adapter(
        registry,
        adapter_path=store.layout.adapter(adapter.run_id),
        adapter_hash=adapter_hash,
        trial_id=training_plan.trial_config.trial_id,
        run_id=adapter.run_id,
        metrics={name: value for name in EVALUATED if (value := getattr(eval_report, name)) is not None},
        tags={"backend": adapter.backend, "date": context.partition_key},
        lineage={
            "date": context.partition_key,
            "dataset_fingerprint": merged_dataset.fingerprint,
            "plan": training_plan.trial_config.model_dump(),
            "base_model": base.name,
            "base_model_fingerprint": eval_report.base_fingerprint,
            "recipe": SETTINGS.recipe,
            **({"continued": _continued(training_plan.continued)} if training_plan.continued else {}),
        },
        evaluations=[eval_report.path],
        exports=SETTINGS.exports,
        environment=SETTINGS.recorded,
        secrets=SETTINGS.secrets,
    )
    if config.promote:
        version = promote(registry, version.version, reason="its run's configuration said so", by=by)
    else:
        decision = decide(
            eval_report, champion(registry), adapter_hash=adapter_hash, min_gain=SETTINGS.min_champion_gain
        )
        version = settle(registry, version.version, decision, by=by)
    context.log.info(f"{version.version} is {version.status}: {version.reason}")
    metadata: dict[str, Any] = {
        "version": version.version,
        "status": version.status,
        "reason": version.reason,
        "adapter_hash": version.adapter_hash,
        "stored_path": path(version.stored_path),
        "metrics": dg.MetadataValue.json(dict(version.metrics)),
    }
    # An adapter that was registered before keeps its lineage; what the date is made of now tells whether it is stale.
    now = {"dataset_fingerprint": merged_dataset.fingerprint, "recipe": SETTINGS.recipe}
    yield dg.MaterializeResult(
        asset_key=key("registered_adapter"),
        value=version.model_copy(update={"lineage": version.lineage | now}),
        metadata=metadata,
        data_version=dg.DataVersion(version.adapter_hash),
    )
    exported = get_version(registry, config.export_version) if config.export_version else version
    if config.export_version or version.status == "champion":
        yield dg.MaterializeResult(
            asset_key=key("promoted_adapter"),
            value=exported,
            metadata={"version": exported.version, "reason": exported.reason, "path": path(exported.stored_path)},
            data_version=dg.DataVersion(exported.adapter_hash),
        )
    else:
        context.log.info(f"exports are skipped: {version.reason}")
