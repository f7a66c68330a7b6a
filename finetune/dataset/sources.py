"""Records from files of several formats: JSON lines, CSV, Parquet, and directories saved by ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson

from finetune.dataset.scan import DEFAULT_LIMITS, Limits, loads
from finetune.errors import DatasetError

if TYPE_CHECKING:
    import polars as pl

SourceFormat = Literal["auto", "jsonl", "csv", "parquet", "hf"]
_SUFFIXES: dict[str, SourceFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
_HF_MARKS = ("state.json", "dataset_dict.json")
_CHOOSE = "Name it with --format: jsonl, csv, parquet or hf"
_ROWS = 1 << 14


@dataclass(frozen=True)
class Row:
    """One line or row: where it stands, and its value, or None if the line cannot be trained on."""

    file: str
    number: int
    value: Any


def find_sources(path: Path, form: SourceFormat = "auto") -> list[tuple[Path, SourceFormat]]:
    """The files to read and their formats; a directory is searched with all below it.

    Raises:
        DatasetError: there is nothing to read, or its format cannot be told.
    """
    if not path.exists():
        raise DatasetError("no such file or directory", where=path, remedy="Check the path")
    if path.is_dir():
        if form == "hf" or (form == "auto" and any((path / mark).is_file() for mark in _HF_MARKS)):
            return [(file, "hf") for file in _arrow_files(path)]
        found = [(file, _SUFFIXES[file.suffix]) for file in sorted(path.rglob("*")) if file.suffix in _SUFFIXES]
        chosen = [(file, found_form) for file, found_form in found if form in ("auto", found_form) and file.is_file()]
        if not chosen:
            wanted = ", ".join(_SUFFIXES) if form == "auto" else form
            raise DatasetError(f"no data files in this directory ({wanted})", where=path, remedy="Check the path")
        return chosen
    if form == "hf":
        raise DatasetError("a dataset saved by datasets is a directory", where=path, remedy=_CHOOSE)
    return [(path, form if form != "auto" else _detect(path))]


def read_rows(file: Path, form: SourceFormat, limits: Limits = DEFAULT_LIMITS) -> Iterator[Row]:
    """Lines or rows of one file in order; `limits` hold for lines.

    Raises:
        DatasetError: the file cannot be read as this format.
    """
    try:
        if form == "jsonl":
            yield from _json_lines(file, limits)
        else:
            yield from _table_rows(file, form)
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror or error}", where=file, remedy="Check the file") from error


def _detect(path: Path) -> SourceFormat:
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    with path.open("rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"{"):
        return "jsonl"
    if head.startswith(b"["):
        raise DatasetError(
            "this is a JSON array, not JSON lines", where=path, remedy="Write one JSON object a line, without commas"
        )
    raise DatasetError("the format cannot be told from name or content", where=path, remedy=_CHOOSE)


def _arrow_files(directory: Path) -> list[Path]:
    files = []
    for state in sorted(directory.rglob("state.json")):
        files += [state.parent / entry["filename"] for entry in orjson.loads(state.read_bytes())["_data_files"]]
    if not files:
        raise DatasetError(
            "no dataset saved by datasets is here: state.json is missing",
            where=directory,
            remedy="Save it with Dataset.save_to_disk, or name another format",
        )
    return files


def _json_lines(file: Path, limits: Limits) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.removesuffix(b"\n").removeprefix(b"\xef\xbb\xbf")
            if text.isspace() or not text:
                continue
            try:
                value = loads(text, limits)
            except ValueError:
                value = None
            yield Row(file.name, number, value)


def _table_rows(file: Path, form: SourceFormat) -> Iterator[Row]:
    import polars as pl

    try:
        number = 0
        for frame in _frames(file, form):
            for row in frame.iter_rows(named=True):
                number += 1
                # A table has all columns in all rows: an empty cell is a field that the record lacks.
                yield Row(file.name, number, {name: value for name, value in row.items() if value is not None})
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0]
        raise DatasetError(f"cannot be read as {form}: {reason}", where=file, remedy=_CHOOSE) from error


def _frames(file: Path, form: SourceFormat) -> Iterator[pl.DataFrame]:
    import polars as pl

    if form == "hf":
        # What datasets writes are streams, which cannot be scanned lazily.
        yield from pl.read_ipc_stream(file).iter_slices(_ROWS)
        return
    # All columns as text: a column of numbers is no training text, but a number among texts is.
    lazy = pl.scan_csv(file, infer_schema=False) if form == "csv" else pl.scan_parquet(file)
    yield from lazy.collect_batches(chunk_size=_ROWS, maintain_order=True)
