"""Datasets, prepared from their exports once more."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from finetune.dataset.discovery import ExportFile
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.prepare import prepare_dataset
from finetune.layout import DataLayout
from finetune.progress import Progress
from finetune.publishing import read_manifest
from finetune.reproduction.at_hand import AtHand, Places
from finetune.reproduction.models import DatasetInput, ExportInput


class PreparedAgain(BaseModel):
    """A dataset that was prepared from its exports once more; `differing` names the files that are otherwise."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    reproduced_fingerprint: str
    differing: list[str]

    @property
    def equal(self) -> bool:
        """Whether the same bytes came out, under the same name."""
        return not self.differing and self.fingerprint == self.reproduced_fingerprint


def why_not_prepared(dataset: DatasetInput, at_hand: AtHand, places: Places) -> str:
    """Why a dataset cannot be prepared again; empty if it can."""
    if not dataset.exports:
        return "it was taken from other datasets" if dataset.datasets else "it was not prepared from exports"
    if not dataset.parameters:
        return "its records were taken from files by an experiment"
    missing = sum(sha256 not in at_hand.exports for sha256 in dataset.exports)
    if missing:
        return f"{missing} of its {len(dataset.exports)} exports are not at hand"
    parameters = _parameters(dataset, places)
    if parameters.deciding(parameters.deletions()) != dataset.parameters:
        return "its deletion list or rules are not those here"
    return ""


def prepare_again(
    dataset: DatasetInput,
    exports: Sequence[ExportInput],
    at_hand: AtHand,
    places: Places,
    layout: DataLayout,
    on_progress: Progress,
) -> PreparedAgain:
    """Prepare a dataset for which `why_not_prepared` knows no reason, under another data root, and compare.

    Raises:
        FinetuneError: as preparation raises.
    """
    files = []
    for file in exports:
        if file.sha256 in dataset.exports:
            path = at_hand.exports[file.sha256]
            status = path.stat()
            files.append(ExportFile(path.parent, file.name, file.date, status.st_size, status.st_mtime_ns))
    again = prepare_dataset(
        files, date=dataset.date, layout=layout, parameters=_parameters(dataset, places), on_progress=on_progress
    )
    outputs = read_manifest(again.path).outputs
    return PreparedAgain(
        fingerprint=dataset.fingerprint,
        reproduced_fingerprint=again.fingerprint,
        differing=[name for name, entry in dataset.files.items() if outputs.get(name) != entry],
    )


def _parameters(dataset: DatasetInput, places: Places) -> PrepareParameters:
    known = {name: value for name, value in dataset.parameters.items() if name in PrepareParameters.model_fields}
    listed = places.deletion_list if "deletions" in dataset.parameters else None
    return PrepareParameters.model_validate({**known, "deletion_list": listed})
