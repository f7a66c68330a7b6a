"""A training without the loop around it: one file of records, one output directory."""

from __future__ import annotations

from pathlib import Path

from finetune.base_model.models import BaseModelRef
from finetune.dataset.inspect import count_lines
from finetune.dataset.models import Counts, PreparedDataset
from finetune.errors import DatasetError
from finetune.planning.models import TrainingPlan
from finetune.publishing import sha256_file, temporary_sibling
from finetune.training.identity import training_run_id
from finetune.training.models import InitAdapter, Nodes, Sharding, TrainingRequest
from finetune.training.reporting import Tracker


def request_for_file(
    dataset: Path,
    *,
    plan: TrainingPlan,
    base_model: BaseModelRef,
    output: Path,
    resume_from: Path | None = None,
    report_to: Tracker = "none",
    processes: int | None = None,
    sharding: Sharding = "ddp",
    nodes: Nodes | None = None,
    init_adapter: InitAdapter | None = None,
) -> TrainingRequest:
    """A request to train on a file of records; its work directory lies in the hidden sibling ``.<output>.work``.

    The same file, plan, base model and output give the same request, so that a killed training goes on.

    Raises:
        DatasetError: there is no such file.
    """
    if not dataset.is_file():
        raise DatasetError("no file of records here", where=dataset, remedy="Name a JSONL file of records")
    fingerprint = sha256_file(dataset)[:16]
    run_id = training_run_id(
        date="file",
        dataset_fingerprint=fingerprint,
        trial=plan.trial_config,
        base_model=base_model,
        backend="hf-peft",
        init_adapter=init_adapter.adapter_hash if init_adapter else None,
    )
    # A training of its own for each plan: none goes on from another one's checkpoint.
    work = output.with_name(f".{output.name}.work") / run_id
    # Trainers read `train.jsonl` of a prepared dataset; the file stays where it is.
    prepared = work / "dataset" / fingerprint
    prepared.mkdir(parents=True, exist_ok=True)
    link = prepared / "train.jsonl"
    # Anew each time: the file may have been moved since, and another one may be in its place.
    fresh = temporary_sibling(link)
    fresh.symlink_to(dataset.absolute())
    fresh.replace(link)
    lines = count_lines(dataset)
    return TrainingRequest(
        run_id=run_id,
        date="file",
        dataset=PreparedDataset(
            path=prepared,
            date="file",
            fingerprint=fingerprint,
            window_dates=[],
            counts=Counts(lines=lines, train=lines, eval=0, duplicates=0, rejected=0, blank=0),
            rejects_by_reason={},
            rejects_by_file={},
            records_by_file={dataset.name: lines},
        ),
        plan=plan,
        base_model=base_model,
        adapter_dir=output,
        work_dir=work,
        init_adapter=init_adapter,
        resume_from=resume_from,
        report_to=report_to,
        processes=processes,
        sharding=sharding,
        nodes=nodes,
    )
