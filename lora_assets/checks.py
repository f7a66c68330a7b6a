"""The gates: each reads the published artifact again, so that damage done since is noticed too."""

import dagster as dg

from finetune.adapter_files import non_finite_tensors
from finetune.dataset.inspect import count_lines, held_out_prompts, leaked_prompts
from finetune.dataset.models import PreparedDataset
from finetune.errors import FinetuneError
from finetune.evaluation.models import EvalReport
from finetune.export.models import GgufExport, MergedModel
from finetune.publishing import read_manifest
from finetune.registry.models import RegisteredVersion
from finetune.search.ensemble.result import EnsembleResult
from finetune.training.models import TrainingResult
from lora_assets.assets.common import SETTINGS, key, log_progress, made_from, path, table
from lora_assets.kubernetes import convert_step
from lora_assets.partitions import dataset_dates
from resources.artifact_store import ArtifactStore
from resources.base_model import BaseModelSource

CHECK_PROMPTS = 4


def _failed(error: FinetuneError) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False, description=str(error))


@dg.asset_check(asset=key("merged_dataset"), partitions_def=dataset_dates, blocking=True)
def dataset_whole_and_not_empty(merged_dataset: PreparedDataset) -> dg.AssetCheckResult:
    """The files are as the manifest says, and both splits hold records."""
    try:
        read_manifest(merged_dataset.path, verify="hashes")
    except FinetuneError as error:
        return _failed(error)
    train, held_out = count_lines(merged_dataset.train_path), count_lines(merged_dataset.eval_path)
    return dg.AssetCheckResult(
        passed=train > 0 and held_out > 0,
        description=f"{train} records to train on, {held_out} held out",
        metadata={"train": train, "eval": held_out},
    )


@dg.asset_check(asset=key("merged_dataset"), partitions_def=dataset_dates, blocking=True)
def reject_rate_under_threshold(merged_dataset: PreparedDataset) -> dg.AssetCheckResult:
    """Few enough lines were rejected (MAX_REJECT_RATE)."""
    counts = merged_dataset.counts
    rejected = count_lines(merged_dataset.rejects_path)
    rate = rejected / max(1, counts.lines - counts.blank)
    return dg.AssetCheckResult(
        passed=rate <= SETTINGS.max_reject_rate,
        description=f"{rejected} of {counts.lines - counts.blank} lines rejected: {rate:.2%}, "
        f"at most {SETTINGS.max_reject_rate:.2%} (MAX_REJECT_RATE); see {merged_dataset.rejects_path}",
        metadata={
            "reject_rate": rate,
            "by_reason": table(
                [{"reason": r, "lines": n} for r, n in sorted(merged_dataset.rejects_by_reason.items())]
            ),
        },
    )


@dg.asset_check(asset=key("merged_dataset"), partitions_def=dataset_dates, blocking=True)
def no_prompt_on_both_sides(merged_dataset: PreparedDataset) -> dg.AssetCheckResult:
    """No held-out prompt was trained on."""
    leaked = leaked_prompts(merged_dataset.train_path, merged_dataset.eval_path)
    return dg.AssetCheckResult(
        passed=not leaked,
        description=f"{len(leaked)} prompts stand in train and eval" + (f", as {leaked[0]!r}" if leaked else ""),
        metadata={"leaked": len(leaked)},
    )


@dg.asset_check(asset=key("adapter"), partitions_def=dataset_dates, blocking=True)
def adapter_whole_and_finite(adapter: TrainingResult, store: ArtifactStore) -> dg.AssetCheckResult:
    """The adapter's files are as the manifest says, and every weight is a number."""
    directory = store.layout.adapter(adapter.run_id)
    try:
        read_manifest(directory, kind="adapter", verify="hashes")
        broken = non_finite_tensors(directory)
    except FinetuneError as error:
        return _failed(error)
    return dg.AssetCheckResult(
        passed=not broken,
        description=f"not finite: {', '.join(broken[:3])}" if broken else "whole, every weight finite",
    )


@dg.asset_check(asset=key("eval_report"), partitions_def=dataset_dates)
def adapter_beats_base(eval_report: EvalReport) -> dg.AssetCheckResult:
    """The adapter's held-out loss is lower than the base model's, beyond chance.

    Not blocking: an adapter that loses is a normal outcome, and the registry keeps it from being exported.
    """
    low, high = eval_report.delta_ci95
    return dg.AssetCheckResult(
        passed=high < 0,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"held-out loss {eval_report.eval_loss:.4f} against {eval_report.base_loss:.4f}: "
        f"{eval_report.delta_vs_base_loss:+.4f}, 95 % between {low:+.4f} and {high:+.4f}",
        metadata={"delta_vs_base_loss": eval_report.delta_vs_base_loss},
    )


@dg.asset_check(asset=key("ensemble_adapter"), partitions_def=dataset_dates)
def combination_beats_best_member(ensemble_adapter: EnsembleResult) -> dg.AssetCheckResult:
    """The combination's held-out loss is lower than its best member's.

    Not blocking: one that is not is a normal outcome, and is not published.
    """
    return dg.AssetCheckResult(
        passed=ensemble_adapter.status != "not_published",
        severity=dg.AssetCheckSeverity.WARN,
        description=ensemble_adapter.reason,
    )


@dg.asset_check(asset=key("registered_adapter"), partitions_def=dataset_dates, blocking=True)
def version_unaltered(registered_adapter: RegisteredVersion, store: ArtifactStore) -> dg.AssetCheckResult:
    """The registered files hash to the version's SHA-256."""
    from finetune.registry.store import verify_version

    try:
        verify_version(store.layout.registry, registered_adapter.version)
    except FinetuneError as error:
        return _failed(error)
    return dg.AssetCheckResult(passed=True, description=f"{registered_adapter.version} is unaltered")


@dg.asset_check(
    asset=key("merged_model"),
    partitions_def=dataset_dates,
    blocking=True,
    op_tags=convert_step(SETTINGS),
    additional_ins=made_from("promoted_adapter", "merged_dataset"),
)
def merged_equals_base_plus_adapter(
    context: dg.AssetCheckExecutionContext,
    merged_model: MergedModel,
    promoted_adapter: RegisteredVersion,
    merged_dataset: PreparedDataset,
    base_model: BaseModelSource,
) -> dg.AssetCheckResult:
    """The merged model, loaded from disk, gives the logits of base + adapter on held-out prompts."""
    from finetune.export.merge_check import check_merge

    try:
        check = check_merge(
            merged_path=merged_model.path,
            base_model=base_model.resolve(log_progress(context)),
            adapter_path=promoted_adapter.stored_path,
            prompts=held_out_prompts(merged_dataset.eval_path, CHECK_PROMPTS),
        )
    except FinetuneError as error:
        return _failed(error)
    return dg.AssetCheckResult(
        passed=True,
        description=f"largest difference of logits {check.max_logit_difference:.2g}, greedy tokens equal",
        metadata={"max_logit_difference": check.max_logit_difference, "path": path(merged_model.path)},
    )


@dg.asset_check(
    asset=key("gguf"),
    partitions_def=dataset_dates,
    blocking=True,
    op_tags=convert_step(SETTINGS),
    additional_ins=made_from("merged_model", "merged_dataset"),
)
def gguf_answers_like_merged_model(
    context: dg.AssetCheckExecutionContext,
    gguf: GgufExport,
    merged_model: MergedModel,
    merged_dataset: PreparedDataset,
) -> dg.AssetCheckResult:
    """A llama.cpp runtime loads the GGUF files and answers like the merged model."""
    from finetune.export.gguf import verify_gguf

    try:
        verification = verify_gguf(
            export=gguf,
            merged=merged_model,
            prompts=held_out_prompts(merged_dataset.eval_path, CHECK_PROMPTS),
            trust_remote_code=SETTINGS.trust_remote_code,
            on_progress=log_progress(context),
        )
    except FinetuneError as error:
        return _failed(error)
    return dg.AssetCheckResult(
        passed=True,
        description="; ".join(
            f"{name}: {share:.0%} of greedy tokens equal" for name, share in verification.greedy_agreement.items()
        ),
        metadata={"question": verification.sample_question, "answer": verification.sample_answer},
    )


GGUF_CHECK = gguf_answers_like_merged_model
ALL_CHECKS = [
    dataset_whole_and_not_empty,
    reject_rate_under_threshold,
    no_prompt_on_both_sides,
    adapter_whole_and_finite,
    adapter_beats_base,
    combination_beats_best_member,
    version_unaltered,
    merged_equals_base_plus_adapter,
    gguf_answers_like_merged_model,
]
