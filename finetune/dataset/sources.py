"""Records from files of several formats: JSON lines, CSV, Parquet, and directories saved by ``datasets``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson

from finetune.dataset.diagnosis import diagnose
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
_HF_MARK = "state.json"
_CHOOSE = "Name it with --format: jsonl, csv, parquet or hf"
_ROWS = 1 << 14


@dataclass(frozen=True)
class Row:
    """One line or row: its file and number, and its value, or None if the line cannot be trained on.

    `line` is the line that was parsed; a table's rows have none.
    """

    file: str
    number: int
    value: Any
    line: bytes = b""


@dataclass(frozen=True)
class Source:
    """A file to read; `name` tells it from the others that were found with it."""

    path: Path
    form: SourceFormat
    name: str


def find_sources(path: Path, form: SourceFormat = "auto") -> list[Source]:
    """The files to read; a directory is searched with all below it, for datasets saved by ``datasets`` too.

    Raises:
        DatasetError: there is nothing to read, not all of it can be looked at, or its format cannot be told.
    """
    try:
        if not path.exists():
            raise DatasetError("no such file or directory", where=path, remedy="Check the path")
        if not path.is_dir():
            return [_single(path, form)]
        found = [source for source in _below(path) if form in ("auto", source.form)]
    except OSError as error:
        raise _unreadable(Path(error.filename or path), error) from error
    if not found and form == "hf":
        raise DatasetError(
            f"no dataset saved by datasets is here: {_HF_MARK} is missing",
            where=path,
            remedy="Save it with Dataset.save_to_disk, or name another format",
        )
    if not found:
        wanted = ", ".join(_SUFFIXES) if form == "auto" else form
        raise DatasetError(f"no data files in this directory ({wanted})", where=path, remedy="Check the path")
    return found


def read_rows(
    file: Path, form: SourceFormat, limits: Limits = DEFAULT_LIMITS, name: str | None = None
) -> Iterator[Row]:
    """Lines or rows of one file in order, told by `name`; `limits` hold for lines.

    Raises:
        DatasetError: the file cannot be read as this format.
    """
    name = name or file.name
    try:
        if form == "jsonl":
            yield from _json_lines(file, limits, name)
        else:
            yield from _table_rows(file, form, name)
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(path: Path, error: OSError) -> DatasetError:
    return DatasetError(f"cannot be read: {error.strerror or error}", where=path, remedy="Check path and permissions")


def _single(path: Path, form: SourceFormat) -> Source:
    if form == "hf":
        raise DatasetError("a dataset saved by datasets is a directory", where=path, remedy=_CHOOSE)
    return Source(path, form if form != "auto" else _detect(path), path.name)


def _below(directory: Path) -> list[Source]:
    found: list[tuple[Path, SourceFormat]] = []
    for folder, _, names in os.walk(directory, onerror=_refuse):
        for file in (Path(folder, name) for name in names):
            # A link to what is not there is nothing that may be left out: reading it will tell.
            if form := _SUFFIXES.get(file.suffix.lower()):
                found += [(file, form)] if file.is_file() or file.is_symlink() else []
            elif file.name == _HF_MARK:
                found += [(arrow, "hf") for arrow in _arrow_files(file)]
    return [Source(file, form, file.relative_to(directory).as_posix()) for file, form in sorted(found)]


def _refuse(error: OSError) -> None:
    raise error


def _detect(path: Path) -> SourceFormat:
    if form := _SUFFIXES.get(path.suffix.lower()):
        return form
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


def _arrow_files(state: Path) -> list[Path]:
    try:
        return [state.parent / entry["filename"] for entry in orjson.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"a dataset saved by datasets is damaged: {_HF_MARK} does not name its files",
            where=state,
            remedy="Save it again with Dataset.save_to_disk, or delete the file if it is not that library's",
        ) from error


def _json_lines(file: Path, limits: Limits, name: str) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.removesuffix(b"\n").removeprefix(b"\xef\xbb\xbf")
            if text.isspace() or not text:
                continue
            yield Row(name, number, _value(text, limits), text)


def _value(line: bytes, limits: Limits) -> Any:
    """The line's value, or None if it is none that preparation would take."""
    try:
        return loads(line, limits)
    except ValueError:
        if len(line) > limits.max_line_bytes:
            return None
    # What looks like an escaped NUL may be a backslash before ``u0000``, which programs' texts hold.
    try:
        diagnose(line, terminated=True, max_depth=limits.max_depth)
    except ValueError:
        return None
    return orjson.loads(line)


def _table_rows(file: Path, form: SourceFormat, name: str) -> Iterator[Row]:
    import polars as pl

    try:
        number = 0
        for frame in _frames(file, form):
            for row in frame.iter_rows(named=True):
                number += 1
                # A table has all columns in all rows: an empty cell is a field that the record lacks.
                yield Row(name, number, {column: value for column, value in row.items() if value is not None})
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
