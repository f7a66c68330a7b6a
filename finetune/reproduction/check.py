"""What a manifest's trainings take, which of it is at hand, and why they cannot be run again, if they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from finetune.dataset.deletions import named_lines
from finetune.errors import ArtifactError, ConfigurationError
from finetune.reproduction.at_hand import AtHand, Found, Places
from finetune.reproduction.circumstances import Difference, differences
from finetune.reproduction.manifest import read_experiment_manifest
from finetune.reproduction.models import DatasetInput, ExperimentManifest, TrainingEntry, VersionManifest
from finetune.reproduction.preparation import why_not_prepared
from finetune.reproduction.provenance import describe_process


class Selection(BaseModel):
    """A manifest, and those of its trainings that are to be run again, in an order in which they can be."""

    model_config = ConfigDict(frozen=True)

    path: Path
    manifest: ExperimentManifest | VersionManifest
    entries: list[TrainingEntry]

    @property
    def datasets(self) -> list[DatasetInput]:
        """The datasets of the trainings, and those that they were taken from."""
        known = {dataset.fingerprint: dataset for dataset in self.manifest.inputs.datasets}
        wanted = [entry.request.dataset.fingerprint for entry in self.entries]
        found: dict[str, DatasetInput] = {}
        while wanted:
            fingerprint = wanted.pop(0)
            if fingerprint in known and fingerprint not in found:
                found[fingerprint] = known[fingerprint]
                wanted += known[fingerprint].datasets
        return list(found.values())


class Checked(BaseModel):
    """What is at hand, what is otherwise here, and why the trainings cannot be run, if they cannot.

    `not_prepared` says of each dataset that is not prepared again why it is not, by its fingerprint.
    """

    model_config = ConfigDict(frozen=True)

    manifest: Path
    trainings: list[str]
    inputs: list[Found]
    differences: list[Difference]
    not_prepared: dict[str, str]
    refusals: list[str]


def select(path: Path, chosen: Sequence[str] = ()) -> Selection:
    """A manifest's trainings, or some of them by their ids.

    Args:
        path: the manifest, or the directory that holds it.
        chosen: ids; none for all.

    Raises:
        ArtifactError: the manifest cannot be read, or contradicts itself.
        ConfigurationError: it tells of no training, or not of a chosen one.
    """
    manifest = read_experiment_manifest(path)
    if not manifest.trainings:
        raise ConfigurationError(
            "the manifest tells of no training that could be run again",
            where=path,
            remedy="It is of an earlier version, of an adapter from elsewhere, or of an experiment without a result",
        )
    known = {entry.run_id: entry for entry in manifest.trainings}
    if unknown := [run_id for run_id in chosen if run_id not in known]:
        raise ConfigurationError(
            f"the manifest tells of no training {', '.join(unknown)}",
            where=path,
            remedy=f"Its trainings are {', '.join(known)}",
        )
    names = list(chosen or known)
    # Those that begin with another's adapter come behind it.
    before = {
        name: [init.run_id] if (init := known[name].request.init_adapter) and init.run_id in names else []
        for name in names
    }
    try:
        ordered = [known[name] for name in TopologicalSorter(before).static_order()]
    except CycleError as error:
        raise ArtifactError(
            "the manifest's trainings begin with each other's adapters", where=path, remedy="Restore it from a backup"
        ) from error
    return Selection(path=path, manifest=manifest, entries=ordered)


def check(selection: Selection, at_hand: AtHand, places: Places) -> Checked:
    """Judge what was found of a selection's inputs."""
    entries, datasets, here = selection.entries, selection.datasets, describe_process()
    not_prepared = {
        dataset.fingerprint: reason for dataset in datasets if (reason := why_not_prepared(dataset, at_hand, places))
    }
    own = {entry.run_id for entry in entries}
    needed = {dataset.fingerprint for dataset in datasets}
    needed |= {sha256 for dataset in datasets for sha256 in dataset.exports}
    needed |= {entry.request.base_model.fingerprint for entry in entries}
    needed |= {
        init.adapter_hash for entry in entries if (init := entry.request.init_adapter) and init.run_id not in own
    }
    inputs = [found for found in at_hand.results if found.expected in needed]
    # Without its exports a dataset is taken as it lies, and without it those that were taken from it.
    trained_on = {entry.request.dataset.fingerprint for entry in entries}
    can_be_missing = {found.expected for found in inputs if found.kind in ("export", "dataset")}
    can_be_missing -= {name for name in trained_on if name in not_prepared}
    refusals = [
        f"{found.kind} {found.name} {_fault(found)}"
        for found in inputs
        if found.state == "changed" or (found.state == "missing" and found.expected not in can_be_missing)
    ]
    told = {found.expected for found in inputs}
    refusals += [
        f"the manifest does not tell of the {what} of training {entry.run_id}"
        for entry in entries
        for what, expected in (
            ("dataset", entry.request.dataset.fingerprint),
            ("base model", entry.request.base_model.fingerprint),
        )
        if expected not in told
    ]
    refusals += [
        f"dataset {dataset.date} holds, or may hold, what is on the deletion list here"
        for dataset in datasets
        if dataset.fingerprint in trained_on and _must_not_be_learned(dataset, at_hand, places)
    ]
    refusals += [
        f"training {entry.run_id} ran elsewhere ({entry.result.backend})"
        for entry in entries
        if entry.result.backend != "hf-peft"
    ]
    otherwise = {(each.what, each.recorded): each for entry in entries for each in differences(entry, here)}
    return Checked(
        manifest=selection.path,
        trainings=[entry.run_id for entry in entries],
        inputs=inputs,
        differences=list(otherwise.values()),
        not_prepared=not_prepared,
        refusals=refusals,
    )


def _must_not_be_learned(dataset: DatasetInput, at_hand: AtHand, places: Places) -> bool:
    if not places.deletions:
        return False
    lying = at_hand.datasets.get(dataset.fingerprint)
    if lying is None:
        # It would be prepared as it was then: without a list, from all that its exports hold.
        return "deletions" not in dataset.parameters
    return any(named_lines(lying / "train.jsonl", places.deletions, places.id_field))


def _fault(found: Found) -> str:
    if found.state == "changed":
        return f"has changed: {found.reason} [{found.path}]"
    places = ", ".join(map(str, found.looked_at))
    return f"is missing{f': {found.reason}' if found.reason else ''} [{places}]"
