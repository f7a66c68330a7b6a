"""What validation found in one export, kept by content so that no file is validated twice.

An index is a published directory of ``records.bin`` (packed `finetune.dataset.scan.RECORD`s in the order of
the file) and ``rejects.jsonl``. It does not know the file's name or date, nor how records are split.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.dataset.discovery import ExportFile
from finetune.dataset.reading import Fingerprint, changed, opened
from finetune.dataset.scan import RECORD, RULES_VERSION, Limits, RangeScan, RangeTask
from finetune.dataset.workers import Scanner, scanning
from finetune.errors import ArtifactError
from finetune.progress import Progress, ProgressEvent
from finetune.publishing import publish_directory, read_manifest, sha256_json

_KIND = "export-index"
# What `finetune.dataset.scan.RECORD` packs, as columns.
_COLUMNS = np.dtype([("content", "<u8", (2,)), ("prompt", "<u8"), ("offset", "<u8"), ("length", "<u4")])


@dataclass(frozen=True)
class FileIndex:
    """The index of one export."""

    file: ExportFile
    fingerprint: Fingerprint
    path: Path
    lines: int
    blank: int
    records: int
    reasons: dict[str, int]

    @property
    def rejected(self) -> int:
        """Lines that are no records."""
        return sum(self.reasons.values())

    @property
    def rejects_path(self) -> Path:
        """One JSON object a rejected line: line, offset, length, reason, field, position, head."""
        return self.path / "rejects.jsonl"

    def rows(self) -> npt.NDArray[np.void]:
        """The records' ``content``, ``prompt``, ``offset`` and ``length``, mapped from the disk."""
        if not self.records:
            return np.empty(0, _COLUMNS)
        return np.memmap(self.path / "records.bin", _COLUMNS, mode="r")


def index_path(directory: Path, fingerprint: Fingerprint, limits: Limits) -> Path:
    """Where the index of a content lies: it depends on the bytes, the limits and the rules alone."""
    key = sha256_json([fingerprint.sha256, limits.max_line_bytes, limits.max_depth, RULES_VERSION])
    return directory / key[:32]


def index_files(
    files: Sequence[tuple[ExportFile, Fingerprint]],
    directory: Path,
    *,
    limits: Limits,
    workers: int,
    on_progress: Progress,
) -> list[FileIndex]:
    """The files' indexes, in their order; only contents that have none in `directory` are validated.

    Args:
        files: exports and their contents.
        directory: where indexes are kept.
        limits: what lines may be.
        workers: processes that validate, at most one a block; 1 means this one alone.
        on_progress: is told of bytes validated.

    Raises:
        DatasetError: a file cannot be read.
        TransientError: a file has changed since it was hashed.
        StorageFullError: the disk is full.
    """
    missing: dict[Path, tuple[ExportFile, Fingerprint]] = {}
    for file, fingerprint in files:
        path = index_path(directory, fingerprint, limits)
        try:
            read_manifest(path, kind=_KIND)
        except ArtifactError:
            missing.setdefault(path, (file, fingerprint))
    if missing:
        blocks = sum(len(fingerprint.blocks) for _, fingerprint in missing.values())
        with scanning(min(workers, blocks)) as scanner:
            _validate(missing, limits, scanner, on_progress)
    return [_load(file, fingerprint, index_path(directory, fingerprint, limits)) for file, fingerprint in files]


def _load(file: ExportFile, fingerprint: Fingerprint, path: Path) -> FileIndex:
    results = read_manifest(path, kind=_KIND).results
    return FileIndex(file=file, fingerprint=fingerprint, path=path, **results)


def _validate(
    missing: dict[Path, tuple[ExportFile, Fingerprint]], limits: Limits, scanner: Scanner, on_progress: Progress
) -> None:
    total = sum(fingerprint.size for _, fingerprint in missing.values())
    done = 0
    # One stream of ranges over all files, so that many small files keep all workers busy too.
    to_do, to_match = itertools.tee(_tasks(missing.values(), limits))
    pairs = zip(to_match, scanner(to_do), strict=True)
    for path, (file, fingerprint) in missing.items():
        done += fingerprint.size
        _publish(path, file, fingerprint, (scan for _, scan in itertools.islice(pairs, len(fingerprint.blocks))))
        on_progress(ProgressEvent("validate", done, total, "bytes"))


def _tasks(files: Iterable[tuple[ExportFile, Fingerprint]], limits: Limits) -> Iterator[RangeTask]:
    for file, fingerprint in files:
        for number, block in enumerate(fingerprint.blocks):
            start = number * fingerprint.block_bytes
            end = min(start + fingerprint.block_bytes, fingerprint.size)
            yield RangeTask(file.path, fingerprint.size, start, end, block, limits)


def _publish(path: Path, file: ExportFile, fingerprint: Fingerprint, scans: Iterable[RangeScan]) -> None:
    lines = blank = size = 0
    reasons: Counter[str] = Counter()
    # Whoever was first at the same content has published the same index.
    with contextlib.suppress(FileExistsError), publish_directory(path, kind=_KIND, replace=path.exists()) as staging:
        with (
            (staging.path / "records.bin").open("wb") as records,
            (staging.path / "rejects.jsonl").open("wb") as rejects,
        ):
            for scan in scans:
                records.write(scan.records)
                size += len(scan.records)
                for number, reject in zip(scan.reject_lines, scan.rejects, strict=True):
                    rejects.write(b'{"line":%d,%b\n' % (lines + number + 1, reject[1:]))
                lines += scan.lines
                blank += scan.blank
                reasons += scan.reasons
        with opened(file.path) as descriptor:
            status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise changed(file.path)
        staging.inputs = {"sha256": fingerprint.sha256, "size": fingerprint.size}
        staging.parameters = {"rules_version": RULES_VERSION}
        staging.results = {
            "lines": lines,
            "blank": blank,
            "records": size // RECORD.size,
            "reasons": dict(sorted(reasons.items())),
        }
