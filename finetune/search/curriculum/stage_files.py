"""The files of a curriculum's stages, prepared as exports are: validated, without duplicates or held-out records."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from xxhash import xxh3_64_intdigest

from finetune.dataset.chosen import link_or_copy
from finetune.dataset.copying import copy_records
from finetune.dataset.deletions import Deletions
from finetune.dataset.discovery import ExportFile
from finetune.dataset.index import FileIndex, index_files
from finetune.dataset.models import Counts, PreparedDataset
from finetune.dataset.normalization import content_key
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.prepare import KIND, load_prepared
from finetune.dataset.reading import Fingerprint, fingerprint_file
from finetune.dataset.rules import checked_turns
from finetune.dataset.scan import Limits
from finetune.dataset.selection import select_records
from finetune.errors import ArtifactError, ConfigurationError, DatasetError
from finetune.hashed_file import HashedFile
from finetune.layout import DataLayout
from finetune.progress import Progress
from finetune.publishing import is_complete, publish_directory, sha256_json
from finetune.search.curriculum.spec import CurriculumSpec

# Part of a fingerprint: raise it when the same files come to give other records.
_METHOD = 1
_BLOCK_BYTES = 1 << 20
_NAMED = 5


class FileCounts(BaseModel):
    """What became of the lines of a stage's file; each is counted once.

    `duplicates` stood before, in this stage or an earlier one; `held_out` have a prompt of the held-out side, the first
    of them are named as ``file:line``; `left_out` are on the deletion list, of too little quality, or near-duplicates.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    file: Path
    sha256: str
    lines: int
    train: int
    duplicates: int
    held_out: int
    rejected: int
    blank: int
    left_out: int
    held_out_at: list[str] = []


@dataclass(frozen=True)
class StageFiles:
    """All stages' records as one dataset, and the stage of each; the held-out records are those of another dataset."""

    dataset: PreparedDataset
    stage_of: NDArray[np.int64]
    files: list[FileCounts]


def prepare_stage_files(
    spec: CurriculumSpec,
    held_out: PreparedDataset,
    layout: DataLayout,
    parameters: PrepareParameters,
    on_progress: Progress,
    deletions: Deletions | None = None,
) -> StageFiles:
    """Prepare the files of all stages, in their order, by the rules by which exports are prepared.

    A record that several files hold is of the first stage that has it. A record whose prompt is on the held-out side is
    left out: by the split's own rule, and where the held-out dataset has it.

    Args:
        spec: whose stages name files.
        held_out: what adapters will be evaluated on.
        layout: where the dataset is published.
        parameters: of the preparation.
        on_progress: told of bytes validated.
        deletions: the deletion list with the contents that its ids name elsewhere
            (`finetune.dataset.deletions.with_contents`); None for the list alone.

    Raises:
        ConfigurationError: a path is relative.
        DatasetError: a file cannot be read, or a stage has no record left.
        TransientError: a file changed meanwhile.
    """
    numbered = [(number, path) for number, stage in enumerate(spec.stages) for path in stage.files]
    target = layout.prepared(held_out.date, "_")
    deletions = deletions or parameters.deletions()
    indexes = index_files(
        [_opened(path, held_out.date) for _, path in numbered],
        target.parent.parent / ".index",
        limits=Limits(parameters.max_line_bytes, parameters.max_depth),
        screening=parameters.screening(deletions),
        workers=1,
        on_progress=on_progress,
    )
    selection = select_records(indexes, deletions, parameters)
    prompts = np.concatenate([index.rows()["prompt"] for index in indexes])
    asked = selection.in_eval | np.isin(prompts, _prompts_of(held_out.eval_path))
    chosen = selection.kept & ~asked
    counts: list[FileCounts] = []
    start = 0
    for (stage, _), index in zip(numbered, indexes, strict=True):
        here = slice(start, start + index.records)
        start += index.records
        kept = selection.kept[here]
        at = np.flatnonzero(kept & asked[here])
        counts.append(
            FileCounts(
                stage=spec.stages[stage].name,
                file=index.file.path,
                sha256=index.fingerprint.sha256,
                lines=index.lines,
                train=int(chosen[here].sum()),
                duplicates=int(selection.duplicates[here].sum()),
                held_out=len(at),
                rejected=index.rejected,
                blank=index.blank,
                left_out=int((~kept & ~selection.duplicates[here]).sum()),
                held_out_at=_places(index, at[:_NAMED]),
            )
        )
    _refuse_empty(spec, counts)
    fingerprint = sha256_json(
        [_METHOD, held_out.fingerprint, [each.sha256 for each in counts], parameters.deciding(deletions)]
    )[: len(held_out.fingerprint)]
    dataset = _publish(target.with_name(fingerprint), held_out, indexes, chosen, counts)
    stage_of = np.repeat([stage for stage, _ in numbered], [each.train for each in counts])
    return StageFiles(dataset, stage_of, counts)


def _opened(path: Path, date: str) -> tuple[ExportFile, Fingerprint]:
    if not path.is_absolute():
        raise ConfigurationError(
            f"the path {path} says nothing about where it begins", where="stages.files", remedy="Give the whole path"
        )
    try:
        status = path.stat()
    except OSError as error:
        raise DatasetError(
            f"a stage's file cannot be read: {error.strerror}", where=path, remedy="Name a JSONL file of records"
        ) from error
    file = ExportFile(path.parent, path.name, date, status.st_size, status.st_mtime_ns)
    return file, fingerprint_file(path, size=file.size, mtime_ns=file.mtime_ns, block_bytes=_BLOCK_BYTES)


def _prompts_of(path: Path) -> NDArray[np.uint64]:
    with path.open("rb") as lines:
        keys = [content_key(checked_turns(orjson.loads(line)))[1] for line in lines]
    return np.array([xxh3_64_intdigest(key) for key in keys], np.uint64)


def _places(index: FileIndex, rows: NDArray[np.int64]) -> list[str]:
    """Where records stand, as ``file:line``."""
    if not len(rows):
        return []
    content = index.file.path.read_bytes()
    offsets = index.rows()["offset"][rows].tolist()
    lines = [content.count(b"\n", 0, offset) + 1 for offset in offsets]
    return [f"{index.file.name}:{line}" for line in lines]


def _refuse_empty(spec: CurriculumSpec, counts: Sequence[FileCounts]) -> None:
    for stage in spec.stages:
        own = [each for each in counts if each.stage == stage.name]
        if not sum(each.train for each in own):
            lines, held_out, twice, rejected, left_out = (
                sum(getattr(each, name) for each in own)
                for name in ("lines", "held_out", "duplicates", "rejected", "left_out")
            )
            raise DatasetError(
                f"stage {stage.name} has no record to train on: of {lines} lines {held_out} are held out, "
                f"{twice} stood before, {rejected} are no records, {left_out} are on the deletion list or left out as "
                "exports are",
                where=", ".join(str(each.file) for each in own),
                remedy="Give the stage other records, or take it out",
            )


def _publish(
    target: Path,
    held_out: PreparedDataset,
    indexes: Sequence[FileIndex],
    chosen: NDArray[np.bool_],
    counts: Sequence[FileCounts],
) -> PreparedDataset:
    if is_complete(target):
        # One that was damaged since is made again.
        with contextlib.suppress(ArtifactError):
            return load_prepared(target).model_copy(update={"reused": True})
    # Whoever was first has published the same bytes.
    with contextlib.suppress(FileExistsError), publish_directory(target, kind=KIND, replace=target.exists()) as staging:
        start = 0
        with HashedFile(staging.path / "train.jsonl") as train:
            for index in indexes:
                copy_records(index, [(chosen[start : start + index.records], train)])
                start += index.records
        link_or_copy(held_out.eval_path, staging.path / "eval.jsonl")
        (staging.path / "rejects.jsonl").touch()
        total = int(chosen.sum())
        dataset = PreparedDataset(
            path=target,
            date=held_out.date,
            fingerprint=target.name,
            window_dates=held_out.window_dates,
            counts=Counts(
                lines=total + held_out.counts.eval,
                train=total,
                eval=held_out.counts.eval,
                duplicates=0,
                rejected=0,
                blank=0,
            ),
            rejects_by_reason={},
            rejects_by_file={},
            records_by_file={str(each.file): each.train for each in counts},
        )
        staging.digests = {"train.jsonl": train.sha256}
        # As preparation describes its exports, in their order.
        staging.inputs = {
            "known": held_out.fingerprint,
            "files": [
                {
                    "name": str(index.file.path),
                    "date": index.file.date,
                    "size": index.fingerprint.size,
                    **each.model_dump(mode="json", exclude={"file", "held_out_at"}),
                }
                for index, each in zip(indexes, counts, strict=True)
            ],
        }
        staging.results = dataset.model_dump(mode="json", exclude={"path", "reused"})
    return load_prepared(target)
