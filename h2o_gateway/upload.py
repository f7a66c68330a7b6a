"""A multipart upload, straight to its place on the disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import HTTPException, Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from finetune.errors import full_disk_named

_FIELD_BYTES = 4096
_FIELDS = 16


@dataclass
class Upload:
    """What has come: the file's size and SHA-256, and the other fields."""

    sha256: str
    size: int
    fields: dict[str, str]


@dataclass
class _Reader:
    """Callbacks of the parser: the part ``file`` goes to `stream`, the others to `fields`."""

    stream: BinaryIO
    fields: dict[str, str] = field(default_factory=dict)
    size: int = 0
    complete: bool = False
    has_file: bool = False

    def __post_init__(self) -> None:
        self.digest = hashlib.sha256()
        self._header = self._value = self._disposition = b""
        self._name = ""
        self._content = bytearray()

    def on_part_begin(self) -> None:
        self._disposition, self._content = b"", bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self.has_file:
                raise HTTPException(422, "file: given twice")
            self.has_file = True
        elif len(self.fields) == _FIELDS:
            raise HTTPException(422, "too many fields")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._name == "file":
            self.stream.write(piece)
            self.digest.update(piece)
            self.size += len(piece)
            return
        self._content += piece
        if len(self._content) > _FIELD_BYTES:
            raise HTTPException(422, "a field is too long")

    def on_part_end(self) -> None:
        if self._name != "file":
            self.fields[self._name] = self._content.decode(errors="replace")

    def on_end(self) -> None:
        self.complete = True


async def receive_upload(request: Request, target: Path) -> Upload:
    """Write the part ``file`` of a multipart request to `target`, hashing as it comes.

    Raises:
        HTTPException: 422 for anything but a whole multipart form with a file.
        StorageFullError: the disk is full.
    """
    kind, options = parse_options_header(request.headers.get("Content-Type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise HTTPException(422, "the body must be multipart/form-data")
    with full_disk_named(target), target.open("xb") as stream:
        reader = _Reader(stream)
        try:
            parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": reader.on_part_begin,
                    "on_header_field": reader.on_header_field,
                    "on_header_value": reader.on_header_value,
                    "on_header_end": reader.on_header_end,
                    "on_headers_finished": reader.on_headers_finished,
                    "on_part_data": reader.on_part_data,
                    "on_part_end": reader.on_part_end,
                    "on_end": reader.on_end,
                },
            )
            async for piece in request.stream():
                parser.write(piece)
        except FormParserError as error:
            raise HTTPException(422, f"the body is no multipart form: {error}") from error
    if not reader.complete:
        raise HTTPException(422, "the body ends in the middle of the form")
    if not reader.has_file:
        raise HTTPException(422, "file: missing")
    return Upload(reader.digest.hexdigest(), reader.size, reader.fields)
