"""Which of a manifest's inputs are at hand, unchanged: looked for where they lay, and where they would lie here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from finetune.adapter_files import adapter_hash
from finetune.base_model.embedded import read_embedded_model
from finetune.base_model.models import BaseModelRef
from finetune.base_model.resolve import resolve_base_model
from finetune.dataset.deletions import Deletions
from finetune.errors import ArtifactError, FinetuneError
from finetune.layout import DataLayout
from finetune.progress import Progress
from finetune.publishing import MANIFEST_NAME, FileEntry, sha256_file
from finetune.reproduction.models import AdapterInput, BaseModelInput, DatasetInput, ExportInput, Inputs

State = Literal["present", "missing", "changed"]
InputKind = Literal[
    "report", "evaluation", "records", "adapter", "training", "base model", "dataset", "export", "merged model"
]


@dataclass(frozen=True)
class Places:
    """Where to look for what a manifest names, and under which conditions.

    Args:
        layout: of the data root here.
        exports: the watched directory here.
        deletion_list: of what must not be learned, if there is one here.
        deletions: what is on it, with its contents (`finetune.dataset.deletions.with_contents`).
        id_field: the field of a record's id.
        hub_token: for a base model on the hub.
        trust_remote_code: whether a base model's own code may run; what a manifest says of it does not count.
    """

    layout: DataLayout
    exports: Path
    deletion_list: Path | None = None
    deletions: Deletions = field(default_factory=Deletions)
    id_field: str = "id"
    hub_token: str | None = None
    trust_remote_code: bool = False


class Found(BaseModel):
    """What became of the search for one thing: `path` is where it is, `looked_at` where it was looked for."""

    model_config = ConfigDict(frozen=True)

    kind: InputKind
    name: str
    # SHA-256, or the fingerprint, or of a training its id
    expected: str
    state: State
    path: Path | None = None
    looked_at: list[Path] = []
    # why it does not count
    reason: str = ""


@dataclass(frozen=True)
class AtHand:
    """All inputs, by what the manifest calls them: those that are present, and the result for each."""

    results: list[Found]
    exports: Mapping[str, Path]
    datasets: Mapping[str, Path]
    base_models: Mapping[str, BaseModelRef]
    adapters: Mapping[str, Path]


def look_for_inputs(inputs: Inputs, places: Places, *, weights: bool, on_progress: Progress) -> AtHand:
    """Look for every input, and hash what is there.

    Args:
        inputs: the manifest's.
        places: where to look.
        weights: whether a base model's weights are fetched from the hub where they are not here yet.
        on_progress: told of what is fetched.
    """
    results = [
        *(look_for_export(file, places) for file in inputs.exports),
        *(look_for_dataset(dataset, places) for dataset in inputs.datasets),
        *(look_for_adapter(adapter, places) for adapter in inputs.adapters),
    ]
    present = [found for found in results if found.state == "present" and found.path is not None]
    models = [
        (each, look_for_base_model(each, places, weights=weights, on_progress=on_progress))
        for each in inputs.base_models
    ]

    def paths(kind: InputKind) -> dict[str, Path]:
        return {found.expected: found.path for found in present if found.kind == kind and found.path}

    return AtHand(
        results=[*results, *(found for _, (found, _) in models)],
        exports=paths("export"),
        datasets=paths("dataset"),
        base_models={each.fingerprint: ref for each, (_, ref) in models if ref is not None},
        adapters=paths("adapter"),
    )


def first_that_fits(candidates: Iterable[Path], fault: Callable[[Path], str]) -> tuple[State, Path | None, str]:
    """The first of several places that holds what is looked for; else what is wrong with the first that is there.

    Args:
        candidates: where to look.
        fault: what is wrong with a place that exists; empty if nothing is.
    """
    wrong: tuple[State, Path | None, str] = ("missing", None, "")
    for path in candidates:
        if not is_there(path):
            continue
        try:
            reason = fault(path)
        except OSError as error:
            reason = f"it cannot be read: {error.strerror}"
        if not reason:
            return "present", path, ""
        if wrong[0] == "missing":
            wrong = ("changed", path, reason)
    return wrong


def is_there(path: Path) -> bool:
    """Whether a path is of something here; one of another machine may lie where this process must not look."""
    try:
        return path.exists()
    except OSError:
        return False


def altered(path: Path, entry: FileEntry) -> str:
    """How a file differs from what it was; empty if it does not."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry.size:
        return f"{path.name} has {size} bytes instead of {entry.size}"
    digest = sha256_file(path)
    return "" if digest == entry.sha256 else f"the SHA-256 of {path.name} is {digest[:12]}"


def find(kind: InputKind, name: str, expected: str, places: list[Path], fault: Callable[[Path], str]) -> Found:
    """Look for something in several places; arguments are those of `Found` and `first_that_fits`."""
    looked_at = list(dict.fromkeys(places))
    state, path, reason = first_that_fits(looked_at, fault)
    return Found(kind=kind, name=name, expected=expected, state=state, path=path, looked_at=looked_at, reason=reason)


def look_for_export(file: ExportInput, places: Places) -> Found:
    """A file of exports, where it lay or among those that are watched here."""
    # A stage's file is named by its whole path.
    candidates = [file.directory / file.name, places.exports / Path(file.name).name]
    entry = FileEntry(size=file.size, sha256=file.sha256)
    return find("export", file.name, file.sha256, candidates, lambda path: altered(path, entry))


def look_for_dataset(dataset: DatasetInput, places: Places) -> Found:
    """A dataset, with all its files."""

    def fault(directory: Path) -> str:
        faults = (altered(directory / name, entry) for name, entry in dataset.files.items())
        return next(filter(None, faults), "")

    candidates = [dataset.path, places.layout.prepared(dataset.date, dataset.fingerprint)]
    return find("dataset", dataset.date, dataset.fingerprint, candidates, fault)


def look_for_adapter(adapter: AdapterInput, places: Places) -> Found:
    """An adapter, by the hash of its weights and configuration."""

    def fault(directory: Path) -> str:
        try:
            actual = adapter_hash(directory)
        except ArtifactError as error:
            return error.what
        return "" if actual == adapter.adapter_hash else f"its hash is {actual[:12]}"

    candidates = [adapter.path, places.layout.adapter(adapter.run_id)]
    return find("adapter", adapter.run_id, adapter.adapter_hash, candidates, fault)


def embedded_at_hand(model: BaseModelInput, places: Places) -> Path | None:
    """Where an embedded model lies, whatever recipe the one has that would be made now; None where it does not."""
    if not model.embedded:
        return None
    candidates = (model.path, places.layout.base_models / model.path.name)
    return next((path for path in candidates if is_there(path / MANIFEST_NAME)), None)


def look_for_base_model(
    model: BaseModelInput, places: Places, *, weights: bool, on_progress: Progress
) -> tuple[Found, BaseModelRef | None]:
    """A base model, and the reference to load it by where it is the one that is looked for.

    Args:
        model: as the manifest names it.
        places: where to look.
        weights: whether weights are fetched from the hub.
        on_progress: told of what is fetched.
    """
    is_local = model.revision is None and not model.embedded
    embedded = embedded_at_hand(model, places)
    try:
        if embedded is not None:
            ref = read_embedded_model(embedded)
        else:
            ref = resolve_base_model(
                None if model.embedded else str(model.path) if is_local else model.name,
                cache_dir=places.layout.base_models,
                revision=model.revision,
                token=places.hub_token,
                trust_remote_code=places.trust_remote_code,
                # The fingerprint of a local directory is that of its weights too.
                weights=weights or is_local,
                on_progress=on_progress,
            )
    except (FinetuneError, OSError) as error:
        found = Found(
            kind="base model",
            name=model.name,
            expected=model.fingerprint,
            state="missing",
            looked_at=[model.path],
            reason=error.what if isinstance(error, FinetuneError) else str(error),
        )
        return found, None
    same = ref.fingerprint == model.fingerprint
    found = Found(
        kind="base model",
        name=model.name,
        expected=model.fingerprint,
        state="present" if same else "changed",
        path=ref.path,
        looked_at=[ref.path],
        reason="" if same else f"its fingerprint is {ref.fingerprint[:12]}",
    )
    # Training and evaluation know a base model by its name, wherever it lies.
    return found, ref.model_copy(update={"name": model.name}) if same else None
