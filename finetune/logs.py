"""Log lines for people or for machines, without secrets in either."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from finetune.redaction import Redactor

LogFormat = Literal["text", "json"]
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_RENAMED = {"levelname": "level", "name": "logger"}


class TextLine(logging.Formatter):
    """Time, level, logger and message.

    Args:
        redact: masks secrets.
    """

    def __init__(self, redact: Redactor) -> None:
        super().__init__(_TEXT)
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """The record as text; an exception's traceback follows in lines of its own."""
        return self._redact(super().format(record))


class JsonLine(JsonFormatter):
    """One JSON object a line: timestamp (ISO 8601, UTC), level, logger, message, and what `extra` brings.

    Args:
        redact: masks secrets.
        ignored: names of `extra` that are no fields.
    """

    def __init__(self, redact: Redactor, ignored: tuple[str, ...] = ()) -> None:
        super().__init__(
            [*_RENAMED, "message"],
            rename_fields=_RENAMED,
            timestamp=True,
            reserved_attrs=[*RESERVED_ATTRS, *ignored],
            json_ensure_ascii=False,
        )
        self._redact = redact

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """The record's fields, as they are about to become JSON."""
        # Before they are JSON, where a secret may be escaped and a mask could take a quotation mark along.
        return {name: self._redact(value) if isinstance(value, str) else value for name, value in log_data.items()}


def line_formatter(log_format: LogFormat, redact: Redactor) -> logging.Formatter:
    """The formatter of LOG_FORMAT."""
    return JsonLine(redact) if log_format == "json" else TextLine(redact)
