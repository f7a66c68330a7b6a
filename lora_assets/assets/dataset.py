"""From exports to a prepared dataset and its profile."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from finetune.chat.encode import RecordEncoder
from finetune.dataset.discovery import discover_exports, stat_fingerprint, window_of
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.dataset.prepare import prepare_dataset
from finetune.dataset.profile import profile_dataset
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
from lora_assets.partitions import dataset_dates
from resources.artifact_store import ArtifactStore
from resources.base_model import BaseModelSource
from resources.retries import no_retry_if_permanent

brain_exports = dg.AssetSpec(
    key=dg.AssetKey([PREFIX, "brain_exports"]),
    description=f"The files {SETTINGS.pattern} of one dataset date, written by the self-learning loop and "
    "reported by the arrival sensor with their fingerprint as data version.",
    group_name="dataset",
    kinds={"jsonl"},
    owners=OWNERS,
    partitions_def=dataset_dates,
)


class DatasetConfig(dg.Config):
    """How exports become a dataset; the defaults are the environment's."""

    window: str = Field(SETTINGS.dataset_window, description="all (up to this date), date (it alone) or last:N.")
    eval_fraction: float = Field(SETTINGS.eval_fraction, description="Share of prompts held out, above 0, below 1.")


@dg.asset(
    **COMMON,
    group_name="dataset",
    deps=[brain_exports],
    kinds={"python", "jsonl"},
    code_version="1",
    description="One training file and its held-out split, the rejects and the manifest. Every line is validated, "
    "exact duplicates are dropped, and the split is decided by the prompt alone.",
)
@no_retry_if_permanent()
def merged_dataset(
    context: dg.AssetExecutionContext, config: DatasetConfig, store: ArtifactStore
) -> dg.MaterializeResult[PreparedDataset]:
    """Prepare the exports of this date's window."""
    files = discover_exports(SETTINGS.exports, SETTINGS.pattern)
    prepared = prepare_dataset(
        files,
        date=context.partition_key,
        layout=store.layout,
        parameters=SETTINGS.prepare_parameters.model_copy(
            update={"window": config.window, "eval_fraction": config.eval_fraction}
        ),
        workers=SETTINGS.prepare_workers,
        on_progress=log_progress(context),
    )
    window = window_of(files, context.partition_key, config.window)
    prepared = prepared.model_copy(update={"stat_fingerprint": stat_fingerprint(window)})
    counts = prepared.counts
    return dg.MaterializeResult(
        value=prepared,
        data_version=dg.DataVersion(prepared.fingerprint),
        metadata={
            "path": path(prepared.path),
            "dagster/row_count": counts.kept,
            "train": counts.train,
            "eval": counts.eval,
            "duplicates": counts.duplicates,
            "rejected": counts.rejected,
            "blank": counts.blank,
            "removed": counts.removed,
            "filtered": counts.filtered,
            "masked": prepared.masked,
            "near_duplicates_dropped": counts.near_duplicates,
            "near_duplicates_found": prepared.near_duplicates_found,
            "near_leaks": prepared.near_leaks,
            "lines": counts.lines,
            "window_dates": ", ".join(prepared.window_dates),
            "rejects_by_reason": table(
                [{"reason": reason, "lines": lines} for reason, lines in sorted(prepared.rejects_by_reason.items())]
            ),
            "rejects_by_file": table(
                [{"file": file, "lines": lines} for file, lines in sorted(prepared.rejects_by_file.items())]
            ),
            "sensitive_by_kind": table(
                [{"kind": kind, "records": count} for kind, count in sorted(prepared.sensitive_by_kind.items())]
            ),
            "rejects": path(prepared.rejects_path),
            "published": published_files(prepared.path),
            "reused": prepared.reused,
        },
    )


@dg.asset(
    **COMMON,
    ins=made_from("merged_dataset"),
    group_name="dataset",
    kinds={"python", "tokenizers"},
    code_version="1",
    description="Counts, columns and exact token statistics with the base model's own tokenizer and chat template.",
)
@no_retry_if_permanent()
def dataset_profile(
    context: dg.AssetExecutionContext, merged_dataset: PreparedDataset, base_model: BaseModelSource
) -> dg.MaterializeResult[DatasetProfile]:
    """Profile every record of the prepared dataset."""
    from finetune.dataset.plots import token_histogram_png

    report = log_progress(context)
    base = base_model.resolve(report, weights=False)
    profile = profile_dataset(merged_dataset, encoder=RecordEncoder.load(base.path), on_progress=report)
    return dg.MaterializeResult(
        value=profile,
        metadata={
            "total_samples": profile.total_samples,
            "format_detected": profile.format_detected,
            "has_instruction": profile.has_instruction,
            "has_output": profile.has_output,
            "avg_tokens": profile.avg_tokens or 0.0,
            "max_tokens": profile.max_tokens or 0,
            "total_tokens": profile.total_tokens or 0,
            "trained_token_share": profile.trained_token_share or 0.0,
            "columns": ", ".join(profile.columns),
            "duplicates_found": profile.duplicates_found,
            "percentiles": table(
                [{"percentile": name, "tokens": value} for name, value in profile.percentiles.items()]
            ),
            "truncation": table([row.model_dump() for row in profile.truncation]),
            "scripts": table([{"script": name, "share": share} for name, share in profile.script_shares.items()]),
            "records_per_file": table(
                [{"file": name, "records": count} for name, count in sorted(profile.records_per_file.items())]
            ),
            "longest": table([row.model_dump() for row in profile.longest]),
            "token_histogram": picture(token_histogram_png(profile)),
            "tokenizer": str(Path(profile.tokenizer).name) if profile.tokenizer else base.name,
            "tokenized_by": profile.tokenized_by or "",
            "tokens_compared": profile.tokens_compared or 0,
            "tokens_differ_at_most": profile.tokens_differ_at_most or 0.0,
        },
    )


__all__ = ["brain_exports", "dataset_profile", "key", "merged_dataset"]
