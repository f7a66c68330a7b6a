"""What all assets share: owners, the progress log, pictures."""

import base64
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, get_args

import dagster as dg

from finetune.errors import ConfigurationError
from finetune.progress import Progress, ProgressEvent
from finetune.publishing import read_manifest
from finetune.reproduction.manifest import read_experiment_manifest
from finetune.reproduction.models import EXPERIMENT_MANIFEST
from finetune.search.spec import TrainingSpec
from lora_assets.kubernetes import gpu_step
from lora_assets.partitions import dataset_dates
from lora_assets.settings import load_settings
from resources.retries import RETRY_POLICY

SETTINGS = load_settings()
# Else H2O LLM Studio does, and no step of ours needs a GPU for it.
TRAINS_HERE = SETTINGS.training_backend == "hf-peft"
PREFIX = SETTINGS.pipeline_name
OWNERS = ["team:ml-platform"]
SECONDS_BETWEEN_REPORTS = 5.0


class AssetArguments(TypedDict):
    """What every asset's decorator takes."""

    key_prefix: str
    partitions_def: dg.PartitionsDefinition[str]
    owners: list[str]
    retry_policy: dg.RetryPolicy


COMMON = AssetArguments(key_prefix=PREFIX, partitions_def=dataset_dates, owners=OWNERS, retry_policy=RETRY_POLICY)


def key(name: str) -> dg.AssetKey:
    """The key of one of the pipeline's assets."""
    return dg.AssetKey([PREFIX, name])


def made_from(*names: str) -> dict[str, dg.AssetIn]:
    """Inputs of an asset or check: parameters that are named like the pipeline's assets."""
    return {name: dg.AssetIn(key=key(name)) for name in names}


class ProtocolArguments(AssetArguments):
    """What the decorator of every research protocol takes besides."""

    ins: dict[str, dg.AssetIn]
    group_name: str
    code_version: str
    pool: str | None
    op_tags: Mapping[str, Any] | None


PROTOCOL = ProtocolArguments(
    **COMMON,
    ins=made_from("merged_dataset", "dataset_profile"),
    group_name="research",
    code_version="1",
    pool="gpu" if TRAINS_HERE else None,
    op_tags=gpu_step(SETTINGS) if TRAINS_HERE else None,
)


def refuse_base_model(spec: TrainingSpec) -> None:
    """See that a run's config names no base model: assets take that of the setting, and reports would name another.

    Raises:
        ConfigurationError: it names one.
    """
    if spec.base_model is not None:
        raise ConfigurationError(
            "base_model is not of a run: assets take that of the setting",
            where="run config",
            remedy="Leave it out, or set BASE_MODEL_NAME",
        )


def log_progress(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> Progress:
    """A listener that writes to the run's log: first and last report of a stage, else one every 5 seconds."""
    last: dict[str, float] = {}

    def report(event: ProgressEvent) -> None:
        now = time.monotonic()
        if (
            event.done == event.total
            or now - last.get(event.stage, -SECONDS_BETWEEN_REPORTS) >= SECONDS_BETWEEN_REPORTS
        ):
            last[event.stage] = now
            context.log.info(str(event))

    return report


def choice(type_of_choice: Any, name: str, value: str) -> Any:
    """A value of run config as the `Literal` that it must be: Dagster's config knows no literals.

    Raises:
        ConfigurationError: names the field, the value and what is allowed.
    """
    allowed = get_args(type_of_choice)
    if value not in allowed:
        raise ConfigurationError(
            f"{value!r} is none of {', '.join(allowed)}", where=f"run config: {name}", remedy="Choose one of them"
        )
    return value


def picture(png: bytes) -> dg.MarkdownMetadataValue:
    """A PNG that the UI shows inline."""
    return dg.MetadataValue.md(f"![](data:image/png;base64,{base64.b64encode(png).decode()})")


def path(value: Path) -> dg.PathMetadataValue:
    """A path that the UI offers to copy."""
    return dg.MetadataValue.path(str(value))


def published_files(directory: Path) -> dg.TableMetadataValue:
    """Name, size and SHA-256 of each file of a published directory, as its manifest says."""
    outputs = read_manifest(directory).outputs
    return table([{"file": name, "bytes": entry.size, "sha256": entry.sha256} for name, entry in outputs.items()])


def made_of(report: Path) -> dict[str, dg.MetadataValue | str]:
    """What an experiment's report was made from, as its manifest says."""
    manifest = read_experiment_manifest(report)
    requests = [entry.request for entry in manifest.trainings]
    return {
        "manifest": path(report / EXPERIMENT_MANIFEST),
        "run_ids": ", ".join(request.run_id for request in requests),
        "dataset_fingerprint": ", ".join(dict.fromkeys(request.dataset.fingerprint for request in requests)),
    }


def table(rows: list[dict[str, str | int | float | bool | None]]) -> dg.TableMetadataValue:
    """A table, which may be empty; a value that is None shows as empty."""
    records = [dg.TableRecord({name: "" if value is None else value for name, value in row.items()}) for row in rows]
    return dg.MetadataValue.table(records, None if rows else dg.TableSchema([]))
