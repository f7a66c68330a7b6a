"""What a dataset is made of: counts, columns, scripts, and the exact length in tokens of every record."""

from __future__ import annotations

import heapq
import itertools
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from finetune.dataset.fast_tokens import FastTokenizer
from finetune.dataset.models import DatasetProfile, LongestRecord, PreparedDataset, Truncation
from finetune.dataset.normalization import content_key
from finetune.dataset.prepare import load_prepared
from finetune.dataset.rules import RejectedError, checked_turns, find_format
from finetune.dataset.scan import Limits
from finetune.dataset.scripts import SCRIPTS, count_letters
from finetune.dataset.sources import Row, SourceFormat, find_sources, read_rows
from finetune.errors import ArtifactError, DatasetError
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import is_complete

if TYPE_CHECKING:
    from finetune.chat.encode import EncodedRecord, RecordEncoder

MAX_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
PERCENTILES = (50, 90, 95, 99)
# Preparation has seen to the limits.
_NO_LIMITS = Limits(max_line_bytes=sys.maxsize, max_depth=1024)
_BATCH = 1024
_BINS = 40
_LONGEST = 10


def profile_dataset(
    dataset: PreparedDataset,
    *,
    encoder: RecordEncoder | None = None,
    tokenizer: str | None = None,
    sample_size: int = 1000,
    on_progress: Progress = ignore_progress,
) -> DatasetProfile:
    """Profile all records of a prepared dataset, those held out included.

    Args:
        dataset: the prepared dataset.
        encoder: the base model's tokenizer and chat template; without it nothing is said of tokens.
        tokenizer: the encoder's name, for the record.
        sample_size: on how many records the fast tokenizer must agree with the model's own before it is
            trusted with the rest; no figure is ever taken from a sample.
        on_progress: is told of the records done.

    Raises:
        DatasetError: the chat template refuses a record.
        ArtifactError: the files do not hold what the manifest says.
    """
    tally = _Tally(encoder, sample_size)
    rows = (row for path in (dataset.train_path, dataset.eval_path) for row in read_rows(path, "jsonl", _NO_LIMITS))
    tally.add_all(rows, dataset.counts.kept, on_progress)
    if tally.records != dataset.counts.kept:
        raise ArtifactError(
            f"{tally.records} records where the manifest counts {dataset.counts.kept}",
            where=dataset.path,
            remedy="Delete the directory and prepare the dataset again",
        )
    return tally.profile(
        format_detected="jsonl",
        tokenizer=tokenizer,
        duplicates_found=dataset.counts.duplicates,
        records_per_file=dataset.records_by_file,
        rejected=dataset.counts.rejected,
    )


def analyze(
    path: Path,
    *,
    format: SourceFormat = "auto",  # noqa: A002 - the contract's name
    encoder: RecordEncoder | None = None,
    tokenizer: str | None = None,
    sample_size: int = 1000,
    on_progress: Progress = ignore_progress,
) -> DatasetProfile:
    """Profile any file or directory of records; rows that are no records are counted as rejected.

    Args:
        path: JSON lines, CSV, Parquet, a directory of such files, one saved by ``datasets``, or a prepared
            dataset.
        format: what it is, or ``auto`` to tell by name and content.
        encoder: the base model's tokenizer and chat template; without it nothing is said of tokens.
        tokenizer: the encoder's name, for the record.
        sample_size: on how many records the fast tokenizer must agree with the model's own before it is
            trusted with the rest; no figure is ever taken from a sample.
        on_progress: is told of the records done.

    Raises:
        DatasetError: unreadable, of no known format, or without a single record.
        ArtifactError: a prepared dataset that is damaged.
    """
    sources = find_sources(path, format)
    if format == "auto" and is_complete(path):
        prepared = load_prepared(path)
        return profile_dataset(
            prepared, encoder=encoder, tokenizer=tokenizer, sample_size=sample_size, on_progress=on_progress
        )
    tally = _Tally(encoder, sample_size)
    rows = (row for source in sources for row in read_rows(source.path, source.form, name=source.name))
    tally.add_all(rows, None, on_progress)
    if not tally.records:
        raise DatasetError(
            f"none of the {tally.rejected} rows is a record (columns: {', '.join(tally.columns) or 'none'})",
            where=path,
            remedy="Name the columns instruction and output, prompt and completion, messages, or text",
        )
    formats = {source.form for source in sources}
    return tally.profile(
        format_detected=formats.pop() if len(formats) == 1 else "mixed",
        tokenizer=tokenizer,
        duplicates_found=tally.duplicates(),
        records_per_file=dict(tally.files),
        rejected=tally.rejected,
    )


class _Tally:
    """Sums over records, one batch at a time; per record it keeps a length and a hash."""

    def __init__(self, encoder: RecordEncoder | None, sample_size: int) -> None:
        self._encoder = encoder
        fast = None if encoder is None else FastTokenizer.of(encoder.tokenizer)
        self._fast = None if encoder is None or fast is None else encoder.with_tokenizer(fast)
        self._sample_size = sample_size
        self._compared = 0
        self._lengths = array("I")
        self._trained = 0
        self._letters = np.zeros(len(SCRIPTS), np.int64)
        self._contents = bytearray()
        self._formats: Counter[str] = Counter()
        self._longest: list[tuple[int, int, str, str | None]] = []
        self.columns: dict[str, None] = {}
        self.files: Counter[str] = Counter()
        self.records = 0
        self.rejected = 0

    def add_all(self, rows: Iterable[Row], total: int | None, on_progress: Progress) -> None:
        for batch in _batches(rows, _BATCH):
            self._add(batch)
            on_progress(ProgressEvent("profile", self.records, total, "records"))

    def _add(self, rows: list[Row]) -> None:
        records: list[tuple[Row, dict[str, Any]]] = []
        texts: list[str] = []
        for row in rows:
            if type(row.value) is dict:
                self.columns.update(dict.fromkeys(row.value))
            try:
                turns = checked_turns(row.value)
            except RejectedError:
                self.rejected += 1
                continue
            records.append((row, row.value))
            texts += (text for _, text in turns)
            self._contents += xxh3_128_digest(content_key(turns)[0])
            self._formats[find_format(row.value) or ""] += 1
            self.files[row.file] += 1
        self._letters += count_letters(texts)
        encoded = self._encode([record for _, record in records])
        for (row, record), tokens in zip(records, encoded, strict=self._encoder is not None):
            length = len(tokens.input_ids)
            self._lengths.append(length)
            self._trained += sum(tokens.trained_mask)
            # Of equally long records the earlier one counts as longer.
            entry = (length, -len(self._lengths), f"{row.file}:{row.number}", _id_of(record))
            if len(self._longest) < _LONGEST:
                heapq.heappush(self._longest, entry)
            else:
                heapq.heappushpop(self._longest, entry)
        self.records += len(records)

    def _encode(self, records: list[dict[str, Any]]) -> list[EncodedRecord]:
        if self._encoder is None:
            return []
        if self._fast is not None and self._compared >= self._sample_size:
            return self._fast.encode(records)
        encoded = self._encoder.encode(records)
        if self._fast is not None:
            self._compared += len(records)
            if self._fast.encode(records) != encoded:
                self._fast = None
        return encoded

    def _differ_at_most(self) -> float:
        return 0.0 if self._compared == self.records else min(1.0, 3 / max(self._compared, 1))

    def duplicates(self) -> int:
        """Records whose content stood before."""
        return self.records - len(np.unique(np.frombuffer(self._contents, "V16")))

    def profile(
        self,
        *,
        format_detected: str,
        tokenizer: str | None,
        duplicates_found: int,
        records_per_file: dict[str, int],
        rejected: int,
    ) -> DatasetProfile:
        lengths = np.frombuffer(self._lengths, np.uint32).astype(np.int64)
        tokens = int(lengths.sum())
        letters = int(self._letters.sum())
        conversational = any(name != "text" for name in self._formats)
        return DatasetProfile(
            total_samples=self.records,
            format_detected=format_detected,
            has_instruction=conversational,
            has_output=conversational,
            avg_tokens=tokens / len(lengths) if len(lengths) else None,
            max_tokens=int(lengths.max()) if len(lengths) else None,
            columns=list(self.columns),
            duplicates_found=duplicates_found,
            percentiles=_percentiles(lengths),
            histogram=_histogram(lengths),
            truncation=_truncation(lengths),
            script_shares={
                name: int(count) / letters for name, count in zip(SCRIPTS, self._letters, strict=True) if letters
            },
            records_per_file=records_per_file,
            record_formats=dict(self._formats.most_common()),
            total_tokens=tokens if len(lengths) else None,
            trained_token_share=self._trained / tokens if tokens else None,
            tokenizer=tokenizer,
            tokenized_by=None if self._encoder is None else "tiktoken" if self._fast else "tokenizers",
            tokens_compared=self._compared if self._fast else None,
            tokens_differ_at_most=self._differ_at_most() if self._fast else None,
            rejected=rejected,
            longest=[
                LongestRecord(where=where, id=id_, tokens=length)
                for length, _, where, id_ in sorted(self._longest, reverse=True)
            ],
        )


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _id_of(record: dict[str, Any]) -> str | None:
    value = record.get("id")
    return str(value) if isinstance(value, str | int) else None


def _percentiles(lengths: npt.NDArray[np.int64]) -> dict[str, int]:
    if not len(lengths):
        return {}
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return {f"p{percentile}": int(value) for percentile, value in zip(PERCENTILES, values, strict=True)}


def _histogram(lengths: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Bins of equal width up to a little beyond p99, and one more for the few that are longer."""
    if not len(lengths):
        return []
    longest = int(lengths.max())
    usual = min(longest, int(np.percentile(lengths, 99) * 1.25))
    width = max(1, -(-(usual + 1) // _BINS))
    edges = list(range(0, usual + width, width))
    if edges[-1] <= longest:
        edges.append(longest + 1)
    counts, _ = np.histogram(lengths, edges)
    return [(low, high, int(count)) for low, high, count in zip(edges, edges[1:], counts, strict=False)]


def _truncation(lengths: npt.NDArray[np.int64]) -> list[Truncation]:
    if not len(lengths):
        return []
    total = int(lengths.sum())
    return [
        Truncation(
            max_length=max_length,
            records=int((lengths > max_length).sum()),
            record_share=float((lengths > max_length).mean()),
            token_share=int(np.maximum(lengths - max_length, 0).sum()) / total,
        )
        for max_length in MAX_LENGTHS
    ]
