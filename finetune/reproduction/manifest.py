"""Writing and reading ``experiment_manifest.json``: from what published directories say of themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from finetune.dataset.models import PreparedDataset
from finetune.dataset.prepare import load_prepared
from finetune.errors import ArtifactError
from finetune.evaluation.models import EvalReport
from finetune.publishing import FileEntry, is_complete, read_manifest, sha256_file
from finetune.redaction import Redactor
from finetune.reproduction.models import (
    EXPERIMENT_MANIFEST,
    SCHEMA_VERSION,
    AdapterInput,
    BaseModelInput,
    Combination,
    DatasetInput,
    Evaluation,
    ExperimentKind,
    ExperimentManifest,
    ExportInput,
    Figure,
    Inputs,
    StoppedTraining,
    TrainingEntry,
    VersionManifest,
)
from finetune.reproduction.provenance import describe_process
from finetune.training.models import TrainingRequest, TrainingResult

# Of the manifest of a dataset that was taken from others: their fingerprints.
_SOURCES = ("dataset", "known")
# Directories of adapters, and those of the reports of their evaluations.
Trainings = Mapping[Path, Sequence[Path]]


def experiment_manifest(
    *,
    kind: ExperimentKind,
    name: str,
    configuration: Mapping[str, Any],
    seed: int | None,
    trainings: Trainings,
    exports: Path,
    environment: Mapping[str, str],
    secrets: Iterable[str],
    figures: Mapping[str, Figure],
    stopped: Sequence[StoppedTraining] = (),
    combinations: Mapping[str, Combination] = MappingProxyType({}),
) -> ExperimentManifest:
    """The manifest of an experiment whose trainings are done; `write_manifest` adds its outputs.

    Args:
        kind: the asset.
        name: the experiment's.
        configuration: its specification, as JSON values.
        seed: of the experiment itself, if it has one; trainings have their own.
        trainings: each adapter's directory, with the directories of its evaluations.
        exports: the directory of the exports that datasets were prepared from.
        environment: the settings in force that may be told.
        secrets: values that must not be told.
        figures: every figure and picture of the report, by name.
        stopped: trainings without an adapter that figures tell of too.
        combinations: adapters that were made from those of trainings, by name.

    Raises:
        ArtifactError: an adapter, an evaluation or a dataset is damaged.
    """
    described = describe(trainings, exports=exports, environment=environment, secrets=secrets, stopped=stopped)
    redact = Redactor(secrets)
    return ExperimentManifest(
        kind=kind,
        name=name,
        configuration=_redacted(dict(configuration), redact),
        figures=dict(figures),
        stopped=list(stopped),
        combinations=dict(combinations),
        metrics={name: figure.value for name, figure in figures.items() if figure.value is not None},
        outputs={},
        **{**described, "seeds": {**({} if seed is None else {name: seed}), **described["seeds"]}},
    )


def describe(
    trainings: Trainings,
    *,
    exports: Path | None,
    environment: Mapping[str, str],
    secrets: Iterable[str],
    stopped: Sequence[StoppedTraining] = (),
) -> dict[str, Any]:
    """What manifests of versions and of experiments have in common; the arguments are `experiment_manifest`'s.

    An adapter whose training left no word of itself (one of an earlier version, or from elsewhere) is left out.

    Raises:
        ArtifactError: an adapter, an evaluation or a dataset is damaged.
    """
    redact = Redactor(secrets)
    entries = [entry for adapter, reports in trainings.items() if (entry := training_entry(adapter, reports))]
    requests = [*(entry.request for entry in entries), *(training.request for training in stopped)]
    provenance = describe_process()
    return {
        "created_at": datetime.now(UTC),
        "inputs": inputs_of(requests, exports),
        "seeds": {request.run_id: request.plan.trial_config.seed for request in requests},
        "trainings": [_entry_redacted(entry, redact) for entry in entries],
        "environment": {name: redact(value) for name, value in environment.items()},
        **dict(provenance.model_copy(update={"command": [redact(word) for word in provenance.command]})),
    }


def training_entry(adapter: Path, reports: Sequence[Path]) -> TrainingEntry | None:
    """What a published adapter's manifest says of its training; None where it says nothing.

    Raises:
        ArtifactError: the adapter or an evaluation is damaged.
    """
    if not is_complete(adapter):
        return None
    manifest = read_manifest(adapter)
    evaluations = [evaluation_of(report) for report in reports]
    if "request" not in manifest.inputs:
        return _registered_entry(adapter, evaluations)
    result = TrainingResult.model_validate({**manifest.results, "adapter_path": adapter, "loss_curve": []})
    return TrainingEntry.model_validate(
        {
            "request": manifest.inputs["request"],
            "result": result,
            "code_version": manifest.inputs["code_version"],
            "outputs": manifest.outputs,
            "evaluations": evaluations,
            "provenance": manifest.inputs.get("provenance"),
        }
    )


def _registered_entry(adapter: Path, evaluations: list[Evaluation]) -> TrainingEntry | None:
    """The training of a registered version, whose manifest holds it."""
    if not (adapter / EXPERIMENT_MANIFEST).is_file():
        return None
    manifest = read_experiment_manifest(adapter)
    for entry in manifest.trainings if isinstance(manifest, VersionManifest) else []:
        result = entry.result.model_copy(update={"adapter_path": adapter})
        return entry.model_copy(update={"result": result, "evaluations": evaluations})
    return None


def evaluation_of(directory: Path) -> Evaluation:
    """What a published evaluation says of itself.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    manifest = read_manifest(directory, kind="evaluation")
    report = EvalReport.model_validate_json((directory / "report.json").read_bytes())
    return Evaluation(
        path=directory,
        sha256=manifest.outputs["report.json"].sha256,
        dataset=report.dataset,
        dataset_sha256=report.dataset_sha256,
        max_length=manifest.parameters["max_length"],
        seed=manifest.parameters["seed"],
        metrics=figures_of(report),
    )


def figures_of(report: EvalReport) -> dict[str, float]:
    """The figures of an evaluation that come out again: all but the time that it took."""
    return {name: value for name, value in report if isinstance(value, float) and name != "seconds"}


def write_manifest(directory: Path, manifest: ExperimentManifest | VersionManifest) -> None:
    """Write a manifest into a directory that is being published, and its files' hashes into it if it lacks them.

    A picture that no figure of the manifest stands for was drawn from all of its trainings.
    """
    outputs = manifest.outputs or {
        path.relative_to(directory).as_posix(): FileEntry(size=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    written: dict[str, Any] = {"outputs": outputs}
    if isinstance(manifest, ExperimentManifest):
        trained = [*(entry.run_id for entry in manifest.trainings), *(each.run_id for each in manifest.stopped)]
        drawn = Figure(runs=[*trained, *manifest.combinations])
        pictures = {name: drawn for name in outputs if name.endswith(".png")}
        written["figures"] = pictures | manifest.figures
    text = manifest.model_copy(update=written).model_dump_json(indent=2)
    (directory / EXPERIMENT_MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_experiment_manifest(path: Path) -> ExperimentManifest | VersionManifest:
    """A manifest, by its file or by the directory that holds it.

    Raises:
        ArtifactError: there is none, it is damaged, or of a newer version than this program knows.
    """
    file = path / EXPERIMENT_MANIFEST if path.is_dir() else path
    try:
        content = json.loads(file.read_bytes())
        if content["schema_version"] > SCHEMA_VERSION:
            raise ArtifactError(
                f"it has schema version {content['schema_version']}, this program knows {SCHEMA_VERSION}",
                where=file,
                remedy="Upgrade lora-assets",
            )
        model = VersionManifest if "version" in content else ExperimentManifest
        return model.model_validate(content)
    except OSError as error:
        raise ArtifactError(
            f"no experiment manifest can be read here: {error.strerror}",
            where=file,
            remedy=f"Name an {EXPERIMENT_MANIFEST}, or the directory of a version or an experiment",
        ) from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ArtifactError(
            f"unreadable experiment manifest: {error}", where=file, remedy="Restore it from a backup"
        ) from error


def inputs_of(requests: Sequence[TrainingRequest], exports: Path | None) -> Inputs:
    """All that trainings read, each once, with the hashes that published directories state.

    Args:
        requests: the trainings'.
        exports: the directory of the exports that their datasets were prepared from.

    Raises:
        ArtifactError: a dataset is damaged.
    """
    datasets: dict[str, DatasetInput] = {}
    read: dict[tuple[str, str], ExportInput] = {}
    for request in requests:
        _add_dataset(request.dataset.path, request.dataset, exports, datasets, read)
    return Inputs(
        exports=list(read.values()),
        datasets=list(datasets.values()),
        base_models=list({base.fingerprint: base for base in map(_base_model, requests)}.values()),
        adapters=list(
            {
                init.adapter_hash: AdapterInput.model_validate(init.model_dump())
                for request in requests
                if (init := request.init_adapter)
            }.values()
        ),
    )


def _base_model(request: TrainingRequest) -> BaseModelInput:
    return BaseModelInput.model_validate(request.base_model.model_dump())


def _add_dataset(
    path: Path,
    dataset: PreparedDataset,
    exports: Path | None,
    datasets: dict[str, DatasetInput],
    read: dict[tuple[str, str], ExportInput],
) -> None:
    """Add a dataset, those that it was taken from, and the exports that they were prepared from."""
    if dataset.fingerprint in datasets:
        return
    taken: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    if is_complete(path):
        manifest = read_manifest(path)
        files, parameters, taken = dict(manifest.outputs), manifest.parameters, dict(manifest.inputs)
    else:
        files = {
            file.name: FileEntry(size=file.stat().st_size, sha256=sha256_file(file))
            for file in (path / "train.jsonl", path / "eval.jsonl")
            if file.is_file()
        }
    own = [
        ExportInput(
            directory=exports or Path(), **{name: file[name] for name in ExportInput.model_fields if name in file}
        )
        for file in taken.pop("files", [])
        if "sha256" in file
    ]
    read.update({(file.name, file.sha256): file for file in own})
    sources = [source for name in _SOURCES if isinstance(source := taken.pop(name, None), str)]
    datasets[dataset.fingerprint] = DatasetInput(
        fingerprint=dataset.fingerprint,
        date=dataset.date,
        path=path,
        files=files,
        parameters=parameters,
        exports=[file.sha256 for file in own],
        datasets=sources,
        taken=taken,
    )
    for source in sources:
        # Another one may be of another date; all lie beside each other.
        for found in path.parent.parent.glob(f"*/{source}"):
            if is_complete(found):
                _add_dataset(found, load_prepared(found), exports, datasets, read)


def _entry_redacted(entry: TrainingEntry, redact: Redactor) -> TrainingEntry:
    if entry.provenance is None:
        return entry
    command = [redact(word) for word in entry.provenance.command]
    return entry.model_copy(update={"provenance": entry.provenance.model_copy(update={"command": command})})


def _redacted(value: Any, redact: Redactor) -> Any:
    """A JSON value whose texts hold no secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: _redacted(each, redact) for name, each in value.items()}
    return [_redacted(each, redact) for each in value] if isinstance(value, list) else value
