"""Following trainings to their data: evaluation, adapter, training, datasets, exports, each compared with its hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import ArtifactError
from finetune.evaluation.models import EvalReport
from finetune.progress import ignore_progress
from finetune.publishing import read_manifest, sha256_file
from finetune.reproduction.at_hand import (
    Found,
    InputKind,
    Places,
    embedded_at_hand,
    find,
    look_for_adapter,
    look_for_base_model,
    look_for_dataset,
    look_for_export,
)
from finetune.reproduction.models import (
    AdapterInput,
    BaseModelInput,
    Combination,
    Evaluation,
    ExportInput,
    Inputs,
    StoppedTraining,
    TrainingEntry,
)
from finetune.training.identity import CODE_VERSION, training_run_id
from finetune.training.models import TrainingRequest


@dataclass(frozen=True)
class Follower:
    """Looks for each thing once, whatever has it in common.

    Args:
        trainings: by their ids.
        combinations: adapters that were made from those of trainings, by name.
        stopped: trainings that left no adapter, by their ids.
        inputs: what the trainings read.
        places: where to look for what does not lie any more where it lay.
    """

    trainings: Mapping[str, TrainingEntry]
    combinations: Mapping[str, Combination]
    stopped: Mapping[str, StoppedTraining]
    inputs: Inputs
    places: Places
    _known: dict[tuple[InputKind, str], Found] = field(default_factory=dict)

    def links(self, run: str) -> Iterator[Found]:
        """The links from a training's evaluations, or a combination's, to the exports."""
        if combination := self.combinations.get(run):
            yield from self._adapter(run, combination.adapter_hash, combination.path, combination.evaluations)
            for member in combination.members:
                yield from self.links(member)
            return
        entry = self.trainings.get(run)
        if entry is None and (ended := self.stopped.get(run)):
            yield _training_link(ended.request, "hf-peft", ended.code_version)
            yield from self._read_by(ended.request)
            return
        if entry is None:
            yield Found(kind="training", name=run, expected=run, state="missing", reason="nothing tells of it")
            return
        result, request = entry.result, entry.request
        yield from self._adapter(run, result.adapter_hash or "", result.adapter_path, entry.evaluations)
        yield _training_link(request, result.backend, entry.code_version)
        yield from self._read_by(request)

    def _read_by(self, request: TrainingRequest) -> Iterator[Found]:
        """What a training began with and learned from."""
        if init := request.init_adapter:
            if init.run_id in self.trainings:
                yield from self.links(init.run_id)
            else:
                yield from self._adapter(init.run_id, init.adapter_hash, init.path, [])
        yield self._base_model(BaseModelInput.model_validate(request.base_model.model_dump()))
        yield from self._datasets(request.dataset.fingerprint, request.date)

    def _adapter(self, run: str, digest: str, path: Path | None, evaluations: Sequence[Evaluation]) -> Iterator[Found]:
        """An adapter, behind its evaluations and the records that they were made on."""
        for evaluation in evaluations:
            yield self._evaluation(run, evaluation, digest)
            if evaluation.dataset is not None:
                yield self._records(evaluation.dataset, evaluation.dataset_sha256)
        if path is not None:
            adapter = AdapterInput(run_id=run, adapter_hash=digest, path=path)
            yield self._once("adapter", digest, lambda: look_for_adapter(adapter, self.places))

    def _evaluation(self, run: str, evaluation: Evaluation, digest: str) -> Found:
        def fault(directory: Path) -> str:
            if reason := altered_directory(directory):
                return reason
            if sha256_file(directory / "report.json") != evaluation.sha256:
                return "it is another evaluation than the figures were taken from"
            report = EvalReport.model_validate_json((directory / "report.json").read_bytes())
            return "" if report.adapter_hash == digest else "it is of another adapter"

        places = [evaluation.path, self.places.layout.model(run, evaluation.path.name)]
        return self._once(
            "evaluation", evaluation.sha256, lambda: find("evaluation", run, evaluation.sha256, places, fault)
        )

    def _records(self, path: Path, digest: str) -> Found:
        def fault(file: Path) -> str:
            return "" if sha256_file(file) == digest else "its SHA-256 is another one"

        places = [path, *(dataset.path / path.name for dataset in self.inputs.datasets)]
        return self._once("records", digest, lambda: find("records", path.name, digest, places, fault))

    def _base_model(self, model: BaseModelInput) -> Found:
        def fault(directory: Path) -> str:
            if directory.name != model.fingerprint:
                return f"it is of the commit {directory.name[:12]}"
            return "" if (directory / "config.json").is_file() else "it is not whole"

        def look() -> Found:
            if model.revision is not None:
                # The hub's cache names directories by the commit; nothing is fetched to follow a figure.
                cached = self.places.layout.base_models / "hub" / f"models--{model.name.replace('/', '--')}"
                places = [model.path, cached / "snapshots" / model.fingerprint]
                return find("base model", model.name, model.fingerprint, places, fault)
            if model.embedded and embedded_at_hand(model, self.places) is None:
                # Nor is anything made.
                return find("base model", model.name, model.fingerprint, [model.path], lambda path: "it is not whole")
            return look_for_base_model(model, self.places, weights=True, on_progress=ignore_progress)[0]

        return self._once("base model", model.fingerprint, look)

    def _datasets(self, fingerprint: str, date: str) -> Iterator[Found]:
        """A dataset, those that it was taken from, and the exports that they were prepared from."""
        dataset = next((each for each in self.inputs.datasets if each.fingerprint == fingerprint), None)
        if dataset is None:
            yield Found(kind="dataset", name=date, expected=fingerprint, state="missing", reason="nothing tells of it")
            return
        yield self._once("dataset", fingerprint, lambda: look_for_dataset(dataset, self.places))
        for source in dataset.datasets:
            yield from self._datasets(source, date)
        for file in self.inputs.exports:
            if file.sha256 in dataset.exports:
                yield self._export(file)

    def _export(self, file: ExportInput) -> Found:
        return self._once("export", file.sha256, lambda: look_for_export(file, self.places))

    def _once(self, kind: InputKind, expected: str, look: Callable[[], Found]) -> Found:
        if (kind, expected) not in self._known:
            self._known[kind, expected] = look()
        return self._known[kind, expected]


def _training_link(request: TrainingRequest, backend: str, code_version: int) -> Found:
    """A training's id is a hash of all that decides its adapter: a request that was altered has another one."""
    found = Found(kind="training", name=request.run_id, expected=request.run_id, state="present")
    if code_version != CODE_VERSION:
        # Names were given by other rules then.
        return found
    named = training_run_id(
        date=request.date,
        dataset_fingerprint=request.dataset.fingerprint,
        trial=request.plan.trial_config,
        base_model=request.base_model,
        backend=backend,
        init_adapter=request.init_adapter.adapter_hash if request.init_adapter else None,
    )
    if named == request.run_id:
        return found
    return found.model_copy(update={"state": "changed", "reason": f"what was asked for is the training {named}"})


def altered_directory(directory: Path) -> str:
    """How a published directory differs from what its manifest says; empty if it does not."""
    try:
        read_manifest(directory, verify="hashes")
    except ArtifactError as error:
        return f"{error.what} [{error.where}]"
    return ""
