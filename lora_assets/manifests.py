"""The manifest of an experiment on this platform: what it was made from, and what each figure was computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from finetune.reproduction.manifest import Trainings, experiment_manifest
from finetune.reproduction.models import Combination, ExperimentKind, ExperimentManifest, Figure, StoppedTraining
from finetune.search.spec import TrainingSpec
from lora_assets.settings import Settings


def manifest_of(
    settings: Settings,
    spec: TrainingSpec,
    *,
    kind: ExperimentKind,
    name: str,
    seed: int | None = None,
    trainings: Trainings,
    figures: Mapping[str, Figure],
    stopped: Sequence[StoppedTraining] = (),
    combinations: Mapping[str, Combination] = MappingProxyType({}),
) -> ExperimentManifest:
    """The manifest, to be written beside the report by `finetune.reproduction.manifest.write_manifest`.

    Args:
        settings: in force.
        spec: the experiment's.
        kind: the asset.
        name: the experiment's.
        seed: of the experiment itself, if it has one.
        trainings: each adapter's directory, with the directories of its evaluations.
        figures: every figure and picture of the report, by name.
        stopped: trainings without an adapter that figures tell of too.
        combinations: adapters that were made from those of trainings, by name.

    Raises:
        ArtifactError: an adapter, an evaluation or a dataset is damaged.
    """
    return experiment_manifest(
        kind=kind,
        name=name,
        configuration=spec.model_dump(mode="json"),
        seed=seed,
        trainings=trainings,
        exports=spec.dataset_path.parent if spec.dataset_path else settings.exports,
        environment=settings.recorded,
        secrets=settings.secrets,
        figures=figures,
        stopped=stopped,
        combinations=combinations,
    )
