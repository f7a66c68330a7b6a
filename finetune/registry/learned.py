"""What a version was trained on, and what it knows of that which another dataset holds out."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.dataset.inspect import leaked_prompts
from finetune.dataset.models import PreparedDataset
from finetune.dataset.prepare import KIND, load_prepared
from finetune.errors import ArtifactError
from finetune.layout import DataLayout
from finetune.publishing import read_manifest
from finetune.registry.descent import ancestry
from finetune.registry.models import RegisteredVersion


def dataset_of(version: RegisteredVersion, layout: DataLayout) -> PreparedDataset | None:
    """What the version was trained on, or None where its lineage does not say, or it is not there any more.

    Raises:
        ArtifactError: it is damaged.
    """
    date, fingerprint = version.lineage.get("date"), version.lineage.get("dataset_fingerprint")
    if not isinstance(date, str) or not isinstance(fingerprint, str):
        return None
    path = layout.prepared(date, fingerprint)
    return load_prepared(path) if path.is_dir() else None


def datasets_behind(
    version: RegisteredVersion, layout: DataLayout
) -> Iterator[tuple[RegisteredVersion, PreparedDataset | None]]:
    """The version, the one that it went on from, and so on, each with what it was trained on.

    Yields:
        None in place of a dataset that is gone or damaged: nobody can tell what it held.

    Raises:
        ArtifactError: an ancestor's manifest was altered.
    """
    for each in ancestry(layout.registry, version):
        try:
            known = dataset_of(each, layout)
        except ArtifactError:
            known = None
        yield each, known


def learned_prompts(known: PreparedDataset, dataset: PreparedDataset) -> list[str]:
    """Prompts that `dataset` holds out and `known` gives to training.

    With the same salt, who held out as much held out the same and more: then no record is read.

    Raises:
        ArtifactError: a manifest was altered.
        DatasetError: a line is no record.
    """
    theirs, ours = (read_manifest(each.path, kind=KIND).parameters for each in (known, dataset))
    if theirs["salt"] == ours["salt"] and theirs["eval_fraction"] >= ours["eval_fraction"]:
        return []
    return leaked_prompts(known.train_path, dataset.eval_path)
