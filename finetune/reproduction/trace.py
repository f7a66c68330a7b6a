"""From a figure of a report back to the data that made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune.errors import ArtifactError, ConfigurationError
from finetune.evaluation.models import EvalReport
from finetune.publishing import MANIFEST_NAME, Manifest, read_manifest, sha256_json
from finetune.reproduction.at_hand import Found, Places, find
from finetune.reproduction.follow import Follower, altered_directory
from finetune.reproduction.manifest import figures_of, inputs_of, read_experiment_manifest, training_entry
from finetune.reproduction.models import (
    EXPERIMENT_MANIFEST,
    Combination,
    Figure,
    Inputs,
    MergedOutput,
    StoppedTraining,
    TrainingEntry,
    VersionManifest,
)


class Chain(BaseModel):
    """The way from the figures of a training, or a combination, to its data."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    links: list[Found]

    @property
    def whole(self) -> bool:
        """Whether every link is there, unaltered."""
        return all(link.state == "present" for link in self.links)


class Trace(BaseModel):
    """A report's figures, and the way back of each training that they were computed from."""

    model_config = ConfigDict(frozen=True)

    report: Found
    figures: dict[str, Figure]
    chains: dict[str, Chain]
    # the model that was merged from the best adapter, if one was and all figures are wanted
    merged: Found | None = None

    @property
    def broken(self) -> list[str]:
        """The figures whose way back is not whole."""
        if self.report.state != "present":
            return list(self.figures)
        return [
            name
            for name, each in self.figures.items()
            # What says of nothing that it was computed from it cannot be followed.
            if not each.runs or not all(self.chains[run].whole for run in each.runs)
        ]


@dataclass(frozen=True)
class _Ground:
    """What a report's directory says of its figures, and of what they were computed from."""

    figures: Mapping[str, Figure]
    trainings: Mapping[str, TrainingEntry]
    inputs: Inputs
    combinations: Mapping[str, Combination] = field(default_factory=dict)
    stopped: Mapping[str, StoppedTraining] = field(default_factory=dict)
    merged: MergedOutput | None = None


def trace(report: Path, places: Places, *, figure: str | None = None) -> Trace:
    """Follow the figures of a report, or one of them, to the exports, and compare each hash on the way.

    Args:
        report: the directory of an experiment's, an evaluation's or a version's report, or a file in it.
        places: where to look for what does not lie any more where it lay.
        figure: the only one that is wanted.

    Raises:
        ArtifactError: no report that says what its figures were made from is here.
        ConfigurationError: it has no such figure.
    """
    directory = (report if report.is_dir() else report.parent).absolute()
    try:
        # Its files may have been altered since: its link tells.
        manifest = Manifest.model_validate_json((directory / MANIFEST_NAME).read_bytes())
        is_evaluation = manifest.kind == "evaluation"
        stated = manifest.outputs["report.json" if is_evaluation else EXPERIMENT_MANIFEST].sha256
        ground = _of_evaluation(directory, manifest, places) if is_evaluation else _of_experiment(directory)
    except (OSError, KeyError, ValidationError) as error:
        raise ArtifactError(
            f"no report that says what its figures were made from is here: {error!r}",
            where=directory,
            remedy="Name the directory of an experiment, an evaluation or a version; older ones do not say",
        ) from error
    figures = dict(ground.figures)
    if figure is not None:
        if figure not in figures:
            raise ConfigurationError(
                f"the report has no figure {figure}", where=directory, remedy=f"It has {', '.join(figures)}"
            )
        figures = {figure: figures[figure]}
    follower = Follower(ground.trainings, ground.combinations, ground.stopped, ground.inputs, places)
    runs = dict.fromkeys(run for each in figures.values() for run in each.runs)
    return Trace(
        report=find("report", manifest.kind, stated, [directory], altered_directory),
        figures=figures,
        chains={run: Chain(run_id=run, links=list(follower.links(run))) for run in runs},
        merged=_merged_model(ground.merged, places) if ground.merged and figure is None else None,
    )


def _merged_model(merged: MergedOutput, places: Places) -> Found:
    def fault(directory: Path) -> str:
        if reason := altered_directory(directory):
            return reason
        return "" if read_manifest(directory).outputs == merged.outputs else "it is another one than was merged then"

    stated = sha256_json({name: entry.sha256 for name, entry in merged.outputs.items()})
    candidates = [merged.path, places.layout.model(merged.run_id, merged.path.name)]
    return find("merged model", merged.run_id, stated, candidates, fault)


def _of_experiment(directory: Path) -> _Ground:
    manifest = read_experiment_manifest(directory)
    trainings = {entry.run_id: entry for entry in manifest.trainings}
    if isinstance(manifest, VersionManifest):
        figures = {name: Figure(value=value, runs=[manifest.run_id]) for name, value in manifest.metrics.items()}
        # The version's own copy, which stays when training's is removed.
        trainings = {
            run: entry.model_copy(update={"result": entry.result.model_copy(update={"adapter_path": directory})})
            for run, entry in trainings.items()
        }
        return _Ground(figures, trainings, manifest.inputs)
    stopped = {ended.run_id: ended for ended in manifest.stopped}
    return _Ground(manifest.figures, trainings, manifest.inputs, manifest.combinations, stopped, manifest.merged)


def _of_evaluation(directory: Path, manifest: Manifest, places: Places) -> _Ground:
    """An evaluation names its adapter, and that its training."""
    report = EvalReport.model_validate_json((directory / "report.json").read_bytes())
    figures = {name: Figure(value=value, runs=[report.run_id]) for name, value in figures_of(report).items()}
    figures |= {name: Figure(runs=[report.run_id]) for name in manifest.outputs if name.endswith(".png")}
    usual = places.layout.adapter(report.run_id)
    adapter = report.adapter_path if report.adapter_path and report.adapter_path.is_dir() else usual
    entry = training_entry(adapter, [directory])
    if entry is None:
        return _Ground(figures, {}, Inputs())
    return _Ground(figures, {report.run_id: entry}, inputs_of([entry.request], places.exports))
