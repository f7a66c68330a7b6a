"""The deletion list: records that no dataset may hold from now on, and the versions that were trained on them.

A text file in UTF-8 with one entry a line: a record's id as it stands in its id field (``id:`` may stand
before it), or ``content:`` and the 32 hexadecimal digits of `content_hash`. Blank lines and lines that
begin with ``#`` say nothing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import BaseModel, ConfigDict
from xxhash import xxh3_128_digest

from finetune.dataset.discovery import ExportFile
from finetune.dataset.normalization import content_key
from finetune.dataset.rules import RejectedError, checked_turns
from finetune.dataset.screening import hash_of_id, id_of
from finetune.dataset.sources import read_rows
from finetune.errors import ArtifactError, ConfigurationError
from finetune.layout import DataLayout
from finetune.publishing import is_complete, sha256_json

if TYPE_CHECKING:
    from finetune.registry.models import RegisteredVersion

_CONTENT = re.compile(r"content:([0-9a-f]{32})", re.IGNORECASE)


@dataclass(frozen=True)
class Deletions:
    """Ids and content hashes of records that must not be learned."""

    ids: frozenset[str] = frozenset()
    contents: frozenset[bytes] = frozenset()

    def __len__(self) -> int:
        return len(self.ids) + len(self.contents)

    @property
    def fingerprint(self) -> str:
        """The same for the same entries, in whatever order they stand."""
        return sha256_json([sorted(self.ids), sorted(content.hex() for content in self.contents)])[:16]

    def has_id(self, record: Any, id_field: str, line: bytes) -> bool:
        """Whether the id of the record, which was parsed from `line`, is on the list."""
        value = id_of(record, id_field, line)
        return (str(value) if type(value) is int else value) in self.ids if type(value) in (int, str) else False

    def name(self, record: Mapping[str, Any], id_field: str, line: bytes) -> bool:
        """Whether the record, which was parsed from `line`, is on the list, by its id or its content."""
        return self.has_id(record, id_field, line) or (bool(self.contents) and _digest(record) in self.contents)


class Deletable(BaseModel):
    """Records of a published dataset that the list names; lines count from 1, those held out were not learned."""

    model_config = ConfigDict(frozen=True)

    path: Path
    train_lines: list[int]
    eval_lines: list[int]
    # Versions of the registry that were trained on this dataset.
    versions: list[str] = []


def content_hash(record: Mapping[str, Any]) -> str:
    """The 32 hexadecimal digits that name a record's content on the list.

    Raises:
        RejectedError: it is no record.
    """
    return _digest(record).hex()


def read_deletions(path: Path) -> Deletions:
    """Read a deletion list.

    Raises:
        ConfigurationError: there is no such file, it cannot be read, or an entry is malformed.
    """
    try:
        # (str.splitlines would part an id at characters that are no line breaks in a file.)
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the deletion list cannot be read: {error}",
            where=path,
            remedy="Nothing is prepared without it: bring it back, or unset DELETION_LIST",
        ) from error
    ids, contents = set(), set()
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if entry.lower().startswith("content:"):
            match = _CONTENT.fullmatch(entry)
            if match is None:
                raise ConfigurationError(
                    f"line {number} of the deletion list holds no content hash",
                    where=path,
                    remedy="Write content: and 32 hexadecimal digits; an id that begins so is written id:content:...",
                )
            contents.add(bytes.fromhex(match[1]))
        elif entry and not entry.startswith("#"):
            ids.add(entry.removeprefix("id:"))
    return Deletions(frozenset(ids), frozenset(contents))


def with_contents(deletions: Deletions, files: Iterable[ExportFile], id_field: str = "id") -> Deletions:
    """The list with the contents of the records that its ids name, so that their duplicates are known too.

    Raises:
        DatasetError: an export cannot be read.
    """
    contents = set(deletions.contents)
    if deletions.ids:
        for file in files:
            for row in read_rows(file.path, "jsonl"):
                if deletions.has_id(row.value, id_field, row.line):
                    # What is no record was never learned.
                    with contextlib.suppress(RejectedError):
                        contents.add(_digest(row.value))
    return Deletions(deletions.ids, frozenset(contents))


def find_deletable(
    layout: DataLayout, deletions: Deletions, versions: Iterable[RegisteredVersion] = (), *, id_field: str = "id"
) -> list[Deletable]:
    """Published datasets that hold what must not be learned, and the versions that were trained on them.

    Every kept record is read again: what the datasets hold is the truth, whatever list they were made with. A
    record with another id and the same content is found if the list has the content (see `with_contents`).

    Args:
        layout: where the datasets lie.
        deletions: the list.
        versions: the registry's versions (`finetune.registry.store.list_versions`).
        id_field: the field of a record's id, or its path such as ``meta.id``.

    Raises:
        ArtifactError: a line of a published dataset is no record.
    """
    trained: dict[str, list[str]] = {}
    for version in versions:
        trained.setdefault(str(version.lineage.get("dataset_fingerprint")), []).append(version.version)
    found = []
    for path in sorted(layout.prepared("date", "fingerprint").parent.parent.glob("[!.]*/[!.]*")):
        if is_complete(path):
            train, held = (
                list(named_lines(path / name, deletions, id_field)) for name in ("train.jsonl", "eval.jsonl")
            )
            if train or held:
                learned = trained.get(path.name, []) if train else []
                found.append(Deletable(path=path, train_lines=train, eval_lines=held, versions=learned))
    return found


def versions_trained_on(found: Sequence[Deletable]) -> list[str]:
    """The versions that learned what is on the list, ``v2`` before ``v10``."""
    return sorted({version for each in found for version in each.versions}, key=lambda version: int(version[1:]))


def id_hashes(deletions: Deletions) -> list[int]:
    """The ids as an index keeps them."""
    return [hash_of_id(value) for value in deletions.ids]


def _digest(record: Mapping[str, Any]) -> bytes:
    return xxh3_128_digest(content_key(checked_turns(record))[0])


def named_lines(path: Path, deletions: Deletions, id_field: str) -> Iterator[int]:
    """The lines of a file of records that the list names, from 1.

    Raises:
        ArtifactError: a line is no record.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if deletions.name(orjson.loads(line), id_field, line):
                    yield number
            except ValueError as error:
                raise ArtifactError(
                    f"line {number} of a published dataset is no record: {error}",
                    where=path,
                    remedy="Delete its directory and prepare the dataset again",
                ) from error
