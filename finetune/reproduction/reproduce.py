"""Doing again what a manifest tells of: datasets from their exports, trainings, evaluations; in a place of its own.

The directory of a reproduction is laid out as a data root. It knows which manifest it is of, so that one that was
killed goes on with its own checkpoints and adapters, and nothing that was made is ever taken from anywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from finetune.errors import ConfigurationError, DatasetError
from finetune.layout import DataLayout
from finetune.progress import Progress
from finetune.publishing import is_complete, sha256_file, write_json_atomically
from finetune.reproduction.at_hand import AtHand, Places, is_there
from finetune.reproduction.check import Selection
from finetune.reproduction.circumstances import differences, must_be_identical
from finetune.reproduction.compare import Compared, all_equal, compare
from finetune.reproduction.manifest import evaluation_of
from finetune.reproduction.models import EXPERIMENT_MANIFEST, TrainingEntry
from finetune.reproduction.preparation import PreparedAgain, prepare_again
from finetune.reproduction.provenance import describe_process
from finetune.training.memory import note_out_of_memory, too_large_micro_batches
from finetune.training.models import InitAdapter, TrainingRequest
from finetune.training.ownership import hold_output

# By how much a weight or a loss may differ where bits need not be equal.
TOLERANCE = 0.01
_MARK = "reproduction.json"


class Reproduced(BaseModel):
    """What came out, beside what the manifest says."""

    model_config = ConfigDict(frozen=True)

    output: Path
    tolerance: float
    datasets: list[PreparedAgain]
    trainings: list[Compared]

    @property
    def equal(self) -> bool:
        """Whether everything came out again."""
        return all(dataset.equal for dataset in self.datasets) and all_equal(self.trainings)


def reproduce(
    selection: Selection,
    at_hand: AtHand,
    places: Places,
    *,
    output: Path,
    tolerance: float,
    not_prepared: Mapping[str, str],
    on_progress: Progress,
) -> Reproduced:
    """Prepare, train and evaluate again, and compare; killed and run again, it goes on.

    Args:
        selection: what to do.
        at_hand: its inputs, checked without a refusal.
        places: where they were looked for.
        output: laid out as a data root; made if need be.
        tolerance: the most by which a weight or a loss may differ, where bits need not be equal.
        not_prepared: fingerprints of the datasets that are taken as they lie.
        on_progress: told of every step.

    Raises:
        ConfigurationError: `output` holds something else.
        TransientError: another process works there.
        FinetuneError: as preparation, training and evaluation raise.
    """
    layout = DataLayout(output.absolute(), places.layout.pipeline)
    _claim(layout.root, selection.path)
    with hold_output(layout.root / "reproduction"):
        datasets = dict(at_hand.datasets)
        prepared = []
        for dataset in selection.datasets:
            if dataset.fingerprint in not_prepared:
                continue
            again = prepare_again(dataset, selection.manifest.inputs.exports, at_hand, places, layout, on_progress)
            prepared.append(again)
            if again.equal:
                datasets[dataset.fingerprint] = layout.prepared(dataset.date, dataset.fingerprint)
        compared: list[Compared] = []
        for entry in selection.entries:
            request = _request(entry, datasets, at_hand, layout, compared)
            metrics, left_out = _train_and_evaluate(entry, request, layout, datasets, on_progress)
            # What began with other weights cannot end with the same.
            exact = must_be_identical(entry, differences(entry, describe_process())) and all(
                each.verdict == "bit-identical" for each in compared
            )
            published = [places.layout.adapter(entry.run_id), _directory(selection.path)]
            if entry.result.adapter_path is not None:
                published.insert(0, entry.result.adapter_path)
            compared.append(
                compare(
                    entry,
                    request.adapter_dir,
                    metrics,
                    published=published,
                    tolerance=tolerance,
                    must_be_identical=exact,
                    not_evaluated=left_out,
                )
            )
    return Reproduced(output=layout.root, tolerance=tolerance, datasets=prepared, trainings=compared)


def _directory(manifest: Path) -> Path:
    return manifest if manifest.is_dir() else manifest.parent


def _claim(root: Path, manifest: Path) -> None:
    """See that a directory is empty, or of this very reproduction."""
    mark = {"manifest_sha256": sha256_file(manifest / EXPERIMENT_MANIFEST if manifest.is_dir() else manifest)}
    known = root / _MARK
    if known.is_file():
        if json.loads(known.read_bytes()) == mark:
            return
        what = "here is the reproduction of another manifest"
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        what = "files that are no reproduction lie here"
    elif any(is_complete(parent) for parent in root.parents):
        what = "this is within a published directory, which stays as it is"
    else:
        write_json_atomically(known, mark)
        return
    raise ConfigurationError(what, where=root, remedy="Name another --output, or remove this one")


def _request(
    entry: TrainingEntry,
    datasets: Mapping[str, Path],
    at_hand: AtHand,
    layout: DataLayout,
    before: Sequence[Compared],
) -> TrainingRequest:
    """What was asked for the first time, from where things lie here, into the places of the reproduction."""
    request = entry.request
    place = datasets.get(request.dataset.fingerprint)
    if place is None:
        raise DatasetError(
            f"the dataset of training {entry.run_id} did not come out again, and is not at hand",
            where=request.dataset.path,
            remedy="Restore it from a backup",
        )
    return request.model_copy(
        update={
            "dataset": request.dataset.model_copy(update={"path": place}),
            "base_model": at_hand.base_models[request.base_model.fingerprint],
            "adapter_dir": layout.adapter(entry.run_id),
            "work_dir": layout.work(entry.run_id),
            "init_adapter": _start(request.init_adapter, at_hand, before),
            "resume_from": None,
            "report_to": "none",
            "processes": entry.result.processes,
            "nodes": None,
        }
    )


def _start(init: InitAdapter | None, at_hand: AtHand, before: Sequence[Compared]) -> InitAdapter | None:
    """The adapter to begin with: as it was made again just now, else as it is at hand."""
    if init is None:
        return None
    for made in before:
        if made.run_id == init.run_id:
            return init.model_copy(update={"path": made.adapter, "adapter_hash": made.reproduced_hash})
    return init.model_copy(update={"path": at_hand.adapters[init.adapter_hash]})


def _train_and_evaluate(
    entry: TrainingEntry,
    request: TrainingRequest,
    layout: DataLayout,
    datasets: Mapping[str, Path],
    on_progress: Progress,
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Train, and evaluate as it was evaluated.

    Returns:
        The metrics by name, as recorded and as found again; the evaluations whose records are not at hand.
    """
    from finetune.evaluation.evaluate import evaluate_adapter
    from finetune.training.sft import train_adapter

    for size in entry.result.out_of_memory[len(too_large_micro_batches(request.work_dir)) :]:
        # What was halved is halved again: sums over other batches differ in their last bits.
        note_out_of_memory(request.work_dir, size)
    metrics: dict[str, tuple[float, float]] = {}
    left_out: list[str] = []
    with _threads(entry.provenance.threads if entry.provenance else None):
        train_adapter(request, on_progress=on_progress)
        for number, evaluation in enumerate(entry.evaluations):
            held_out = _held_out(evaluation.dataset, evaluation.dataset_sha256, datasets)
            if held_out is None:
                left_out.append(evaluation.path.name)
                continue
            output = layout.model(entry.run_id, f"evaluation-{number}")
            evaluate_adapter(
                base_model=request.base_model,
                adapter_path=request.adapter_dir,
                dataset=held_out,
                output_dir=output,
                run_id=entry.run_id,
                max_length=evaluation.max_length,
                seed=evaluation.seed,
                sample_answers=0,
                on_progress=on_progress,
            )
            again = evaluation_of(output).metrics
            mark = "" if len(entry.evaluations) == 1 else f" ({evaluation.path.name})"
            metrics |= {
                f"{name}{mark}": (once, again[name]) for name, once in evaluation.metrics.items() if name in again
            }
    return metrics, left_out


def _held_out(path: Path | None, digest: str, datasets: Mapping[str, Path]) -> Path | None:
    """The records of an evaluation: where they lay, else in one of the datasets; None where they are nowhere."""
    candidates = [path, *(directory / "eval.jsonl" for directory in datasets.values())]
    return next((each for each in candidates if each and is_there(each) and sha256_file(each) == digest), None)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with as many threads as the first time: sums in another order differ in their last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
