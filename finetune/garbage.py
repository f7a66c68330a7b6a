"""What lies under a data root and is of no use to anybody any more: found by rules, removed one by one.

Nothing is removed that a living training works on, that a version which reigns, may reign again or is among
the newest is served from, or that is younger than the age that is asked for. The registry's versions and the
prepared datasets, which the versions' lineage names, are never touched; nor are locks, which the kernel drops
with their holders, and whose removal could let two in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.errors import TransientError
from finetune.publishing import is_abandoned, is_complete, remove_tree, seconds_unchanged, withdraw
from finetune.registry.history import read_events, reigns
from finetune.registry.models import RegisteredVersion
from finetune.registry.store import list_versions

Rule = Literal["temporary", "checkpoints", "work", "exports", "adapter", "index", "values"]
# What is made anew from a version where it is needed again; reports of its evaluation stay.
_EXPORTS = ("merged", "gguf", "ollama", "lmstudio")
_DAY = 24 * 3600
# Kept exclusive while something of a training is removed.
Hold = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Garbage:
    """One thing to remove.

    Attributes:
        rule: why it is garbage.
        path: where it lies.
        size: bytes that its removal frees; what is linked from elsewhere too is not counted.
        run_id: the training that it is of, if of one.
    """

    rule: Rule
    path: Path
    size: int
    run_id: str | None = None


def find_garbage(root: Path, *, keep: int, days: float, live: frozenset[str], busy: bool = False) -> list[Garbage]:
    """What `remove_garbage` may remove.

    Args:
        root: the data root, with whatever pipelines share it.
        keep: of each pipeline, how many of the newest versions keep their exports, and how many of the
            versions that reigned last, the champion among them.
        days: how long nothing in a thing must have changed; temporary files wait for a day alone.
        live: the trainings that somebody works on.
        busy: whether anything runs that may read exports and adapters, which then stay.

    Raises:
        ArtifactError: a registry was altered, so that nobody can tell what is in use.
    """
    registries = [path for path in _children(root / "registry") if path.is_dir()]
    versions = {path.name: list_versions(path) for path in registries}
    served = {run_id for path in registries for run_id in _served(path, versions[path.name], keep)}
    trained = {version.run_id for known in versions.values() for version in known if version.status != "collected"}
    # Of a pipeline whose registry is not there (yet, or its volume is not mounted) nobody can tell what is in use.
    unknown = {path.name for path in (root / "adapters").glob("*/*") if path.parent.name not in versions}
    found = [*_temporary(root), *_work(root, days, live), *_indexes(root, days), *_values(root, days)]
    if not busy:
        found += [*_exports(root, days, live | served | unknown), *_adapters(root, days, live | trained | unknown)]
    return sorted(found, key=lambda garbage: (garbage.rule, garbage.path))


def remove_garbage(garbage: Sequence[Garbage], *, hold: Hold) -> list[Garbage]:
    """Remove what was found; whoever is killed meanwhile leaves nothing half, and a second run ends it.

    Args:
        garbage: as `find_garbage` found it.
        hold: a training's lease, held while something of it is removed; what somebody else holds stays.

    Returns:
        What was removed.
    """
    removed = []
    for each in garbage:
        try:
            if each.run_id is None:
                _remove(each)
            else:
                with hold(each.run_id):
                    _remove(each)
        except (TransientError, FileNotFoundError):
            # Somebody has just begun to work on it, or has removed it.
            continue
        removed.append(each)
    return removed


def _remove(garbage: Garbage) -> None:
    if garbage.rule == "temporary":
        remove_tree(garbage.path)
    else:
        withdraw(garbage.path)


def _served(registry: Path, versions: Sequence[RegisteredVersion], keep: int) -> set[str]:
    """The trainings whose exports stay."""
    reigned = set(reigns(read_events(registry))[-keep:])
    newest = versions[-keep:]
    return {version.run_id for version in versions if version in newest or version.version in reigned}


def _temporary(root: Path) -> Iterator[Garbage]:
    places = ["prepared", "adapters", "models", "registry", "work", "assets", "alerts", "base_losses"]
    found = [path for place in places for path in (root / place).rglob(".*")]
    # The hub's cache below has files of its own kind.
    found += [*(root / "base_models").glob(".*"), *(root / "base_models" / "gguf").rglob(".*")]
    for path in found:
        if is_abandoned(path):
            yield Garbage("temporary", path, _size(path))


def _work(root: Path, days: float, live: frozenset[str]) -> Iterator[Garbage]:
    finished = {path.name for path in (root / "adapters").glob("*/*") if is_complete(path)}
    for path in _children(root / "work"):
        if path.name in live or path.name.startswith("."):
            continue
        if _is_old(path, days):
            yield Garbage("work", path, _size(path), path.name)
        elif path.name in finished and (path / "checkpoints").is_dir():
            yield Garbage("checkpoints", path / "checkpoints", _size(path / "checkpoints"), path.name)


def _exports(root: Path, days: float, kept: frozenset[str]) -> Iterator[Garbage]:
    for training in _children(root / "models"):
        for part in _EXPORTS:
            path = training / part
            if training.name not in kept and path.is_dir() and _is_old(path, days):
                yield Garbage("exports", path, _size(path), training.name)


def _adapters(root: Path, days: float, kept: frozenset[str]) -> Iterator[Garbage]:
    for path in (root / "adapters").glob("*/[!.]*"):
        # What curricula and ensembles came to is in no registry, and bears their reports' names.
        reported = (root / "experiments" / path.parent.name / path.name).exists()
        if path.name not in kept and not reported and is_complete(path) and _is_old(path, days):
            yield Garbage("adapter", path, _size(path), path.name)


def _indexes(root: Path, days: float) -> Iterator[Garbage]:
    for path in (root / "prepared").glob("*/.index/[!.]*"):
        if is_complete(path) and _is_old(path, days):
            yield Garbage("index", path, _size(path))


def _values(root: Path, days: float) -> Iterator[Garbage]:
    """What the steps of one asset handed to each other, by run."""
    for path in _children(root / "assets" / ".steps"):
        if path.is_dir() and _is_old(path, days):
            yield Garbage("values", path, _size(path))


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _is_old(path: Path, days: float) -> bool:
    return seconds_unchanged(path) > days * _DAY


def _size(path: Path) -> int:
    files = [each.lstat() for each in (path, *path.rglob("*")) if each.is_file() and not each.is_symlink()]
    return sum(status.st_size for status in files if status.st_nlink == 1)
