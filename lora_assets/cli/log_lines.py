"""The log of a command: what it tells on standard error, and what libraries log, as LOG_FORMAT asks for."""

from __future__ import annotations

import io
import logging
from typing import IO, cast

from finetune.errors import ConfigurationError
from finetune.logs import line_formatter
from finetune.redaction import Redactor
from lora_assets.cli.console import err
from lora_assets.settings import load_settings

_logger = logging.getLogger("lora_assets.cli")
# Of libraries only what is worth a person's time.
_OURS = ("lora_assets", "finetune", "resources", "sensors")


class _Lines(io.TextIOBase):
    """What is written for a person, as records of the log."""

    def write(self, text: str, /) -> int:
        for line in filter(None, map(str.strip, text.splitlines())):
            _logger.log(logging.ERROR if line.startswith("error: ") else logging.INFO, line.removeprefix("error: "))
        return len(text)


def set_up_logs() -> None:
    """Give the process its log; with LOG_FORMAT=json every line on standard error is one object.

    A setting that is wrong is told by the command itself, which reads them too.
    """
    try:
        settings = load_settings()
    except ConfigurationError:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(line_formatter(settings.log_format, Redactor(settings.secrets)))
    # A record that a run has taken is told by the run's own log.
    handler.addFilter(lambda record: not hasattr(record, "dagster_meta"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if settings.log_format == "json":
        for name in _OURS:
            logging.getLogger(name).setLevel(logging.INFO)
        err.file = cast(IO[str], _Lines())
