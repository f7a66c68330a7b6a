"""What validation found in one export, kept by content so that no file is validated twice.

An index is a published directory of ``records.bin`` (packed `finetune.dataset.scan.RECORD`s in the order of
the file) and ``rejects.jsonl``. It does not know the file's name or date, nor how records are split. A dataset
that screens its records has indexes of its own, which hold what `finetune.dataset.screening` found too:
``keys.bin``, ``bands.bin``, ``findings.jsonl``, and ``masked.jsonl`` with each masked record's number in
``masked.bin``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from finetune.dataset.discovery import ExportFile
from finetune.dataset.near import BANDS
from finetune.dataset.reading import Fingerprint, changed, opened
from finetune.dataset.scan import RECORD, RULES_VERSION, Limits, RangeScan, RangeTask
from finetune.dataset.screening import KEY_COLUMNS, Screened, Screening
from finetune.dataset.workers import Scanner, scanning
from finetune.errors import ArtifactError
from finetune.progress import Progress, ProgressEvent
from finetune.publishing import publish_directory, read_manifest, sha256_json

_KIND = "export-index"


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
    # Records in which each kind of sensitive data was found.
    findings: dict[str, int] = field(default_factory=dict)
    masked: int = 0

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
            return np.empty(0, RECORD)
        return np.memmap(self.path / "records.bin", RECORD, mode="r")

    def keys(self) -> npt.NDArray[np.void]:
        """The records' ``arrived``, ``id`` and ``quality``, mapped from the disk; screened exports alone have them."""
        if not self.records:
            return np.empty(0, KEY_COLUMNS)
        return np.memmap(self.path / "keys.bin", KEY_COLUMNS, mode="r")

    def bands(self) -> npt.NDArray[np.uint64]:
        """The records' hashes that near-duplicates share, of shape (records, bands), mapped from the disk."""
        if not self.records:
            return np.empty((0, BANDS), np.uint64)
        return np.memmap(self.path / "bands.bin", "<u8", mode="r").reshape(-1, BANDS)

    @property
    def findings_path(self) -> Path:
        """One JSON object a line with sensitive data: line, offset, length, fields and their kinds."""
        return self.path / "findings.jsonl"

    def masked_lines(self) -> dict[int, bytes]:
        """Masked records by their numbers, each without its line feed."""
        if not self.masked:
            return {}
        numbers = np.fromfile(self.path / "masked.bin", np.uint64)
        lines = (self.path / "masked.jsonl").read_bytes().split(b"\n")[:-1]
        return dict(zip(numbers.tolist(), lines, strict=True))


def index_path(directory: Path, fingerprint: Fingerprint, limits: Limits, screening: Screening | None = None) -> Path:
    """Where the index of a content lies: it depends on the bytes, the limits, the rules and the screening alone."""
    key = [fingerprint.sha256, limits.max_line_bytes, limits.max_depth, RULES_VERSION]
    return directory / sha256_json(key if screening is None else [*key, asdict(screening)])[:32]


def index_files(
    files: Sequence[tuple[ExportFile, Fingerprint]],
    directory: Path,
    *,
    limits: Limits,
    screening: Screening | None = None,
    workers: int,
    on_progress: Progress,
) -> list[FileIndex]:
    """The files' indexes, in their order; only contents that have none in `directory` are validated.

    Args:
        files: exports and their contents.
        directory: where indexes are kept.
        limits: what lines may be.
        screening: what else to look for in records.
        workers: processes that validate, at most one a block; 1 means this one alone.
        on_progress: is told of bytes validated.

    Raises:
        DatasetError: a file cannot be read.
        TransientError: a file has changed since it was hashed.
        StorageFullError: the disk is full.
    """
    missing: dict[Path, tuple[ExportFile, Fingerprint]] = {}
    for file, fingerprint in files:
        path = index_path(directory, fingerprint, limits, screening)
        try:
            read_manifest(path, kind=_KIND)
        except ArtifactError:
            missing.setdefault(path, (file, fingerprint))
        else:
            # Its age counts from its last use.
            with contextlib.suppress(OSError):
                os.utime(path)
    if missing:
        blocks = sum(len(fingerprint.blocks) for _, fingerprint in missing.values())
        with scanning(min(workers, blocks)) as scanner:
            _validate(missing, _tasks(missing.values(), limits, screening), scanner, on_progress)
    return [
        _load(file, fingerprint, index_path(directory, fingerprint, limits, screening)) for file, fingerprint in files
    ]


def _load(file: ExportFile, fingerprint: Fingerprint, path: Path) -> FileIndex:
    results = read_manifest(path, kind=_KIND).results
    return FileIndex(file=file, fingerprint=fingerprint, path=path, **results)


def _validate(
    missing: dict[Path, tuple[ExportFile, Fingerprint]],
    tasks: Iterable[RangeTask],
    scanner: Scanner,
    on_progress: Progress,
) -> None:
    total = sum(fingerprint.size for _, fingerprint in missing.values())
    done = 0
    # One stream of ranges over all files, so that many small files keep all workers busy too.
    to_do, to_match = itertools.tee(tasks)
    pairs = zip(to_match, scanner(to_do), strict=True)
    for path, (file, fingerprint) in missing.items():
        done += fingerprint.size
        _publish(path, file, fingerprint, (scan for _, scan in itertools.islice(pairs, len(fingerprint.blocks))))
        on_progress(ProgressEvent("validate", done, total, "bytes"))


def _tasks(
    files: Iterable[tuple[ExportFile, Fingerprint]], limits: Limits, screening: Screening | None
) -> Iterator[RangeTask]:
    for file, fingerprint in files:
        for number, block in enumerate(fingerprint.blocks):
            start = number * fingerprint.block_bytes
            end = min(start + fingerprint.block_bytes, fingerprint.size)
            yield RangeTask(file.path, fingerprint.size, start, end, block, limits, screening)


def _publish(path: Path, file: ExportFile, fingerprint: Fingerprint, scans: Iterable[RangeScan]) -> None:
    # Whoever was first at the same content has published the same index.
    with contextlib.suppress(FileExistsError), publish_directory(path, kind=_KIND, replace=path.exists()) as staging:
        results = _write(staging.path, scans)
        with opened(file.path) as descriptor:
            status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise changed(file.path)
        staging.inputs = {"sha256": fingerprint.sha256, "size": fingerprint.size}
        staging.parameters = {"rules_version": RULES_VERSION}
        staging.results = results


def _write(directory: Path, scans: Iterable[RangeScan]) -> dict[str, object]:
    lines = blank = records = 0
    reasons: Counter[str] = Counter()
    screened = _ScreenedFiles(directory)
    with (
        (directory / "records.bin").open("wb") as rows,
        (directory / "rejects.jsonl").open("wb") as rejects,
        screened,
    ):
        for scan in scans:
            rows.write(scan.records)
            for number, reject in zip(scan.reject_lines, scan.rejects, strict=True):
                rejects.write(_numbered(lines + number + 1, reject))
            if scan.screened:
                screened.write(scan.screened, lines, records)
            lines += scan.lines
            blank += scan.blank
            records += len(scan.records) // RECORD.itemsize
            reasons += scan.reasons
    return {
        "lines": lines,
        "blank": blank,
        "records": records,
        "reasons": dict(sorted(reasons.items())),
        **screened.results(),
    }


def _numbered(line: int, entry: bytes) -> bytes:
    return b'{"line":%d,%b\n' % (line, entry[1:])


class _ScreenedFiles(contextlib.ExitStack):
    """Files of what screening found, made when there is something to write."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._files: dict[str, BinaryIO] = {}
        self._kinds: Counter[str] = Counter()
        self._masked = 0

    def write(self, found: Screened, lines: int, records: int) -> None:
        """Append what a range holds that begins after so many lines and records."""
        self._file("keys.bin").write(found.keys)
        if found.bands:
            self._file("bands.bin").write(found.bands)
        for number, finding in zip(found.finding_lines, found.findings, strict=True):
            self._file("findings.jsonl").write(_numbered(lines + number + 1, finding))
        for number, line in found.masked:
            self._file("masked.bin").write(np.uint64(records + number).tobytes())
            self._file("masked.jsonl").write(line + b"\n")
        self._kinds += found.kinds
        self._masked += len(found.masked)

    def results(self) -> dict[str, object]:
        """For the manifest; empty where nothing was screened."""
        if not self._files:
            return {}
        return {"findings": dict(sorted(self._kinds.items())), "masked": self._masked}

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = self.enter_context((self._directory / name).open("wb"))
        return self._files[name]
