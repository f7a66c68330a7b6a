"""From exports to a dataset: validated, without duplicates, split, as raw bytes, published whole.

Records are copied as they arrived, one a line. They stand in the order of their files (by date, then
name) and lines, and of equal ones the first is kept. The output depends on the files' names and bytes,
the date and the parameters alone, not on how many processes worked on it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from pydantic import ValidationError

from finetune.dataset.copying import copy_entries, copy_records
from finetune.dataset.deletions import Deletions
from finetune.dataset.discovery import ExportFile, window_of
from finetune.dataset.index import FileIndex, index_files
from finetune.dataset.lookup import RecordReader
from finetune.dataset.models import Counts, PreparedDataset
from finetune.dataset.near import NearDuplicate
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.reading import Fingerprint, fingerprint_file
from finetune.dataset.scan import RULES_VERSION, Limits
from finetune.dataset.selection import select_records
from finetune.errors import ArtifactError, DatasetError
from finetune.hashed_file import HashedFile
from finetune.layout import DataLayout
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import is_complete, publish_directory, read_manifest, sha256_json

KIND = "prepared-dataset"
_FORMAT_VERSION = 1
_FINGERPRINT_DIGITS = 16
_RANGE_BYTES = 1 << 20
_EXAMPLES = 5


def prepare_dataset(
    files: Sequence[ExportFile],
    *,
    date: str,
    layout: DataLayout,
    parameters: PrepareParameters | None = None,
    workers: int = 1,
    range_bytes: int = _RANGE_BYTES,
    on_progress: Progress = ignore_progress,
) -> PreparedDataset:
    """Make the dataset of a date, or find it made already.

    Args:
        files: exports of any dates, as `finetune.dataset.discovery.discover_exports` lists them.
        date: the dataset's ISO date.
        layout: where it is published; indexes of the files are kept beside it.
        parameters: window, split and limits; None for the defaults.
        workers: processes that validate; 1 means this one alone.
        range_bytes: how much of a file a worker takes at a time.
        on_progress: is told of bytes hashed, validated and written.

    Raises:
        ConfigurationError: the deletion list cannot be read.
        DatasetError: no files in the window, one cannot be read, no record was kept, or one side of the
            split is empty.
        TransientError: a file changed or vanished meanwhile.
        StorageFullError: the disk is full.
    """
    parameters = parameters or PrepareParameters()
    deletions = parameters.deletions()
    window = window_of(files, date, parameters.window)
    if not window:
        raise DatasetError(
            f"no exports for the dataset of {date} in the window {parameters.window!r}",
            where=files[0].directory if files else layout.exports,
            remedy="Wait for exports, or choose another date or window",
        )
    inputs = _fingerprints(window, workers, range_bytes, on_progress)
    fingerprint = sha256_json(
        {
            "format": [_FORMAT_VERSION, RULES_VERSION],
            "files": [[file.name, file.date, content.sha256] for file, content in inputs],
            "parameters": parameters.deciding(deletions),
        }
    )[:_FINGERPRINT_DIGITS]
    target = layout.prepared(date, fingerprint)
    if is_complete(target):
        # One that was damaged since is made again.
        with contextlib.suppress(ArtifactError):
            return load_prepared(target).model_copy(update={"reused": True})
    indexes = index_files(
        inputs,
        target.parent.parent / ".index",
        limits=Limits(parameters.max_line_bytes, parameters.max_depth),
        screening=parameters.screening(deletions),
        workers=workers,
        on_progress=on_progress,
    )
    return _publish(target, date, indexes, parameters, deletions, on_progress)


def load_prepared(path: Path) -> PreparedDataset:
    """A published dataset.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    manifest = read_manifest(path, kind=KIND)
    try:
        return PreparedDataset.model_validate({**manifest.results, "path": path})
    except ValidationError as error:
        raise ArtifactError(
            f"the manifest does not describe a dataset: {error}",
            where=path,
            remedy="Delete the directory and prepare the dataset again",
        ) from error


def _fingerprints(
    files: Sequence[ExportFile], workers: int, range_bytes: int, on_progress: Progress
) -> list[tuple[ExportFile, Fingerprint]]:
    total, done = sum(file.size for file in files), 0
    inputs = []

    def fingerprint(file: ExportFile) -> Fingerprint:
        return fingerprint_file(file.path, size=file.size, mtime_ns=file.mtime_ns, block_bytes=range_bytes)

    with ThreadPoolExecutor(workers) as threads:
        for file, content in zip(files, threads.map(fingerprint, files), strict=True):
            inputs.append((file, content))
            done += file.size
            on_progress(ProgressEvent("hash", done, total, "bytes"))
    return inputs


def _publish(
    target: Path,
    date: str,
    indexes: list[FileIndex],
    parameters: PrepareParameters,
    deletions: Deletions,
    on_progress: Progress,
) -> PreparedDataset:
    selection = select_records(indexes, deletions, parameters)
    total, done, start = sum(index.fingerprint.size for index in indexes), 0, 0
    described: list[dict[str, Any]] = []
    # Whoever was first at the same inputs has published the same bytes.
    with contextlib.suppress(FileExistsError), publish_directory(target, kind=KIND, replace=target.exists()) as staging:
        with contextlib.ExitStack() as files:

            def output(name: str) -> BinaryIO:
                return files.enter_context((staging.path / name).open("wb", buffering=1 << 20))

            train = files.enter_context(HashedFile(staging.path / "train.jsonl"))
            held = files.enter_context(HashedFile(staging.path / "eval.jsonl"))
            rejects = output("rejects.jsonl")
            findings = output("findings.jsonl") if parameters.sensitive_data != "off" else None
            if parameters.near_duplicates != "off":
                _write_pairs(selection.near, RecordReader(indexes), output("near_duplicates.jsonl"))
            for index in indexes:
                of_file = slice(start, start + index.records)
                kept = selection.kept[of_file]
                start += index.records
                in_eval = selection.in_eval[of_file]
                copy_records(index, [(kept & ~in_eval, train), (kept & in_eval, held)])
                copy_entries(index, index.rejects_path, rejects)
                if findings is not None:
                    copy_entries(index, index.findings_path, findings)
                counts = Counts(
                    lines=index.lines,
                    train=int((kept & ~in_eval).sum()),
                    eval=int((kept & in_eval).sum()),
                    duplicates=int(selection.duplicates[of_file].sum()),
                    rejected=index.rejected,
                    blank=index.blank,
                    removed=int(selection.removed[of_file].sum()),
                    filtered=int(selection.filtered[of_file].sum()),
                    near_duplicates=int(selection.near_duplicates[of_file].sum()),
                )
                described.append(_describe(index, counts))
                done += index.fingerprint.size
                on_progress(ProgressEvent("write", done, total, "bytes"))
        staging.digests = {"train.jsonl": train.sha256, "eval.jsonl": held.sha256}
        dataset = PreparedDataset(
            path=target,
            date=date,
            fingerprint=target.name,
            window_dates=sorted({index.file.date for index in indexes}),
            counts=Counts(**{name: sum(entry[name] for entry in described) for name in Counts.model_fields}),
            rejects_by_reason=dict(sum((Counter(index.reasons) for index in indexes), Counter()).most_common()),
            rejects_by_file={index.file.name: index.rejected for index in indexes if index.rejected},
            records_by_file={entry["name"]: entry["train"] + entry["eval"] for entry in described},
            sensitive_by_kind=dict(sum((Counter(index.findings) for index in indexes), Counter()).most_common()),
            masked=sum(index.masked for index in indexes),
            near_duplicates_found=sum(not pair.across for pair in selection.near),
            near_leaks=sum(pair.across for pair in selection.near),
        )
        _check(dataset, indexes)
        staging.inputs = {"files": described}
        staging.parameters = parameters.deciding(deletions)
        staging.results = dataset.model_dump(mode="json", exclude={"path", "reused"})
    return dataset


def _write_pairs(pairs: Sequence[NearDuplicate], records: RecordReader, output: BinaryIO) -> None:
    for pair in pairs:
        entry = {
            **records.place(pair.record),
            "near": records.place(pair.other),
            "similarity": round(pair.similarity, 4),
            "relation": "held out and trained on" if pair.across else "same side",
        }
        output.write(orjson.dumps(entry) + b"\n")


def _describe(index: FileIndex, counts: Counts) -> dict[str, Any]:
    return {
        "name": index.file.name,
        "date": index.file.date,
        "size": index.fingerprint.size,
        "sha256": index.fingerprint.sha256,
        **counts.model_dump(),
        "reasons": index.reasons,
    }


def _check(dataset: PreparedDataset, indexes: Sequence[FileIndex]) -> None:
    counts = dataset.counts
    if counts.lines != counts.accounted:
        raise AssertionError(f"lines were lost or counted twice: {counts!r}")
    if not counts.kept:
        reasons = ", ".join(f"{reason} {count}" for reason, count in dataset.rejects_by_reason.items()) or "none"
        examples = "; ".join(itertools.islice(_examples(indexes), _EXAMPLES))
        raise DatasetError(
            f"none of the {counts.lines} lines is a record to train on ({counts.blank} blank; rejected: {reasons}"
            + (f"; on the deletion list: {counts.removed}" if counts.removed else "")
            + (f"; of too little quality, or without a number that says: {counts.filtered}" if counts.filtered else "")
            + ")"
            + (
                f", for example {examples}; all of them in {indexes[0].path.parent}/*/rejects.jsonl" if examples else ""
            ),
            where=indexes[0].file.path.parent,
            remedy="Correct the program that writes the exports; a record has instruction and output, prompt and "
            "completion, messages, conversations, or text",
        )
    for side, count in (("training", counts.train), ("evaluation", counts.eval)):
        if not count:
            raise DatasetError(
                f"all {counts.kept} records fell to one side of the split and none is left for {side}",
                where=f"the dataset of {dataset.date}",
                remedy="Bring more data, or change the share that is held out (EVAL_FRACTION)",
            )


def _examples(indexes: Sequence[FileIndex]) -> Iterator[str]:
    """Where rejects are, each reason of a file once: ``file:line reason``."""
    for index in indexes:
        seen = set()
        with index.rejects_path.open("rb") as lines:
            for line in lines:
                reject = orjson.loads(line)
                if reject["reason"] not in seen:
                    seen.add(reject["reason"])
                    yield f"{index.file.name}:{reject['line']} {reject['reason']}"
