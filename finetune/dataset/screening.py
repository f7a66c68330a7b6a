"""A closer look at records, for what only some datasets need: keys to delete and filter by, sensitive data.

What is found is kept in the export's index, by content: neither another deletion list nor another threshold
of quality makes a line be read again.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, Literal

import numpy as np
import orjson
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from finetune.dataset.near import bands, shingles
from finetune.dataset.rules import RejectedError, checked_turns
from finetune.dataset.sensitive import find_sensitive, masked

SensitiveMode = Literal["off", "report", "mask", "reject"]
# A record's keys: the hash of its content as it arrived, the hash of its id (0: none), its quality (NaN: none).
KEYS = Struct("<16sQd")
KEY_COLUMNS = np.dtype([("arrived", "<u8", (2,)), ("id", "<u8"), ("quality", "<f8")])


@dataclass(frozen=True)
class Screening:
    """What to look for: fields may be paths such as ``meta.quality``; `rules` are those of what is looked for."""

    id_field: str | None = None
    quality_field: str | None = None
    sensitive: SensitiveMode = "off"
    near: bool = False
    rules: tuple[str, ...] = ()


@dataclass
class Screened:
    """What was found in a range.

    `keys` are packed `KEYS`, one a record, and `bands` those of `finetune.dataset.near`. `findings` are lines
    of JSON, with the lines' numbers within the range beside them. `masked` are records written anew, with
    their numbers among the range's records.
    """

    keys: bytes = b""
    bands: bytes = b""
    findings: list[bytes] = field(default_factory=list)
    finding_lines: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    masked: list[tuple[int, bytes]] = field(default_factory=list)


class Screener:
    """Looks at the records of one range, in their order; `result` is then whole."""

    def __init__(self, screening: Screening) -> None:
        self._screening = screening
        self._keys: list[bytes] = []
        self._bands: list[bytes] = []
        self._found = Screened()

    def screen(self, body: bytes, *, line: int, offset: int, content: bytes) -> Any | None:
        """Look at one record.

        Args:
            body: its bytes.
            line: its line's number within the range.
            offset: where it stands in the file.
            content: its normalised content.

        Returns:
            The record without its sensitive data, if it held any and that is to be masked.

        Raises:
            RejectedError: it holds sensitive data, and such records are to be rejected.
        """
        wanted = self._screening
        record = orjson.loads(body)
        keys = KEYS.pack(
            xxh3_128_digest(content),
            hash_of_id(id_of(record, wanted.id_field, body)),
            _number(value_at(record, wanted.quality_field)),
        )
        clean = None
        if wanted.sensitive != "off" and (fields := _sensitive_fields(record)):
            finding = {"offset": offset, "length": len(body), "fields": fields}
            self._found.findings.append(orjson.dumps(finding))
            self._found.finding_lines.append(line)
            self._found.kinds.update({kind for kinds in fields.values() for kind in kinds})
            if wanted.sensitive == "reject":
                raise RejectedError("sensitive_data", field=next(iter(fields)))
            if wanted.sensitive == "mask":
                # The standard library keeps numbers of any size.
                clean = _map_strings(json.loads(body), lambda text: masked(text, find_sensitive(text)))
                text = json.dumps(clean, ensure_ascii=False, separators=(",", ":"))
                self._found.masked.append((len(self._keys), text.encode()))
        self._keys.append(keys)
        if wanted.near:
            self._bands.append(bands(shingles(checked_turns(record if clean is None else clean))))
        return clean

    def result(self) -> Screened:
        """All that was found."""
        self._found.keys = b"".join(self._keys)
        self._found.bands = b"".join(self._bands)
        return self._found


def hash_of_id(value: Any) -> int:
    """64 bits for a text or a whole number, which stands for its digits; 0 for all else."""
    if type(value) is int:
        value = str(value)
    return xxh3_64_intdigest(value.encode()) if type(value) is str and value else 0


def id_of(record: Any, path: str | None, line: bytes) -> Any:
    """The record's id; `line` is what it was parsed from."""
    value = value_at(record, path)
    # orjson reads whole numbers beyond 64 bits as fractions; the standard library does not.
    return value_at(json.loads(line), path) if type(value) is float else value


def value_at(record: Any, path: str | None) -> Any:
    """The value of a field, or of a path such as ``meta.quality``; None if there is none."""
    if path is None:
        return None
    for name in path.split("."):
        record = record.get(name) if type(record) is dict else None
    return record


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) else math.nan


def _sensitive_fields(record: Any) -> dict[str, list[str]]:
    """The kinds found, by the path of their field, such as ``messages[1].content``."""
    found: dict[str, list[str]] = {}
    waiting: list[tuple[str, Any]] = [("", record)]
    while waiting:
        path, value = waiting.pop()
        if type(value) is str:
            if findings := find_sensitive(value):
                found[path] = sorted({finding.kind for finding in findings})
        elif type(value) is dict:
            waiting += [(f"{path}.{name}".removeprefix("."), each) for name, each in reversed(value.items())]
        elif type(value) is list:
            waiting += [(f"{path}[{number}]", each) for number, each in reversed(list(enumerate(value)))]
    return found


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if type(value) is str:
        return change(value)
    if type(value) is dict:
        return {name: _map_strings(each, change) for name, each in value.items()}
    return [_map_strings(each, change) for each in value] if type(value) is list else value
