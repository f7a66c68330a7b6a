"""``experiment_manifest.json``: all that it takes to do something again, and what came of it the first time."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from finetune.publishing import FileEntry
from finetune.reproduction.provenance import Provenance
from finetune.training.models import TrainingRequest, TrainingResult

EXPERIMENT_MANIFEST = "experiment_manifest.json"
SCHEMA_VERSION = 2

# The assets that publish one beside their report.
ExperimentKind = Literal["hpo_study", "ablation_report", "curriculum_adapter", "ensemble_adapter", "continual_report"]


class ExportInput(BaseModel):
    """One file of exports; `size` in bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    date: str
    size: int
    sha256: str
    # where it lay
    directory: Path


class DatasetInput(BaseModel):
    """A dataset: one that was prepared from exports, or records that were taken from others, or one file."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    date: str
    path: Path
    files: dict[str, FileEntry]
    # what decided about records, of one that was prepared from exports
    parameters: dict[str, Any]
    # the exports that it was prepared from by SHA-256, and the datasets that it was taken from by fingerprint; the
    # inputs have them in full
    exports: list[str]
    datasets: list[str]
    # how it was taken from them: a fold, a choice, a replay
    taken: dict[str, Any]


class BaseModelInput(BaseModel):
    """A base model; `fingerprint` is the hub's commit, or a SHA-256 of its files."""

    model_config = ConfigDict(frozen=True)

    name: str
    revision: str | None
    fingerprint: str
    path: Path
    embedded: bool


class AdapterInput(BaseModel):
    """An adapter that a training began with, made elsewhere or by another training of the same experiment."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    adapter_hash: str
    path: Path


class Inputs(BaseModel):
    """Everything that was read, each once; of a registered version its lineage too."""

    model_config = ConfigDict(frozen=True, extra="allow")

    exports: list[ExportInput] = []
    datasets: list[DatasetInput] = []
    base_models: list[BaseModelInput] = []
    adapters: list[AdapterInput] = []

    @property
    def lineage(self) -> dict[str, Any]:
        """What the caller of the registry told of the version."""
        return dict(self.model_extra or {})


class Evaluation(BaseModel):
    """An evaluation of a training's adapter: its report's directory and hash, the records, and what it found."""

    model_config = ConfigDict(frozen=True)

    path: Path
    # of its ``report.json``
    sha256: str
    # None where the report does not say
    dataset: Path | None
    dataset_sha256: str
    max_length: int
    seed: int
    metrics: dict[str, float]


class TrainingEntry(BaseModel):
    """One training: what was asked for, what came of it, and under what it ran."""

    model_config = ConfigDict(frozen=True)

    request: TrainingRequest
    # without its loss curve, which lies beside the adapter
    result: TrainingResult
    # decides, with the request, which adapter comes out
    code_version: int
    # the adapter's files
    outputs: dict[str, FileEntry]
    evaluations: list[Evaluation]
    # None where it ran elsewhere
    provenance: Provenance | None

    @property
    def run_id(self) -> str:
        """The training's id."""
        return self.request.run_id


class StoppedTraining(BaseModel):
    """A training that ended early or failed, and left no adapter: what was asked for, and why it ended."""

    model_config = ConfigDict(frozen=True)

    request: TrainingRequest
    reason: str
    code_version: int

    @property
    def run_id(self) -> str:
        """The training's id."""
        return self.request.run_id


class Manifest(Provenance):
    """What both kinds of manifest say: inputs, configuration, seeds, trainings, circumstances, outputs."""

    # What is written has all fields.
    model_config = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)

    schema_version: int = SCHEMA_VERSION
    created_at: datetime
    inputs: Inputs
    # an experiment's specification, as it was given
    configuration: dict[str, Any] = Field(default_factory=dict)
    # of the experiment, and of each training by its id
    seeds: dict[str, int] = Field(default_factory=dict)
    trainings: list[TrainingEntry] = Field(default_factory=list)
    # the settings on a list of those that decide what is made; never a secret
    environment: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float]
    outputs: dict[str, FileEntry]


class VersionManifest(Manifest):
    """The manifest of a registered version; version 1 of the format knew no trainings."""

    kind: Literal["registered_adapter"] = "registered_adapter"
    version: str
    adapter_hash: str
    run_id: str
    trial_id: str
    adapter_config: dict[str, Any]
    tags: dict[str, str]


class Figure(BaseModel):
    """A figure of a report, or a picture where there is no value, and the adapters that it was computed from.

    `runs` are ids of trainings, or names of combinations.
    """

    model_config = ConfigDict(frozen=True)

    value: float | None = None
    runs: list[str]


class Combination(BaseModel):
    """An adapter that was made from those of trainings; `path` is None where it was measured and not kept."""

    model_config = ConfigDict(frozen=True)

    adapter_hash: str
    path: Path | None
    # ids of the trainings
    members: list[str]
    evaluations: list[Evaluation]


class MergedOutput(BaseModel):
    """The model that was merged from a training's adapter, and published beside the experiment."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    path: Path
    outputs: dict[str, FileEntry]


class ExperimentManifest(Manifest):
    """The manifest of an experiment: a search or another protocol."""

    kind: ExperimentKind
    name: str
    figures: dict[str, Figure]
    stopped: list[StoppedTraining] = Field(default_factory=list)
    combinations: dict[str, Combination] = Field(default_factory=dict)
    # None where nothing was merged
    merged: MergedOutput | None = None


_EITHER: TypeAdapter[VersionManifest | ExperimentManifest] = TypeAdapter(
    Annotated[VersionManifest | ExperimentManifest, Field(discriminator="kind")]
)


def manifest_schema() -> str:
    """The JSON Schema (draft 2020-12) of manifests as they are written now."""
    schema = _without_defaults(_EITHER.json_schema(mode="serialization"))
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": EXPERIMENT_MANIFEST}
    return json.dumps(head | schema, indent=2) + "\n"


def _without_defaults(schema: Any) -> Any:
    """A schema without the values that fields have where nobody set them: what is written has all values."""
    if isinstance(schema, list):
        return [_without_defaults(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    names = {"properties", "$defs"}
    return {
        key: {name: _without_defaults(each) for name, each in value.items()}
        if key in names
        else _without_defaults(value)
        for key, value in schema.items()
        if key != "default"
    }
