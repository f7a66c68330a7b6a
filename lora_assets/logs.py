"""The log lines of runs, as LOG_FORMAT asks for: as JSON each names its run, dataset date and step."""

import io
import logging
import os
import sys
import weakref
from collections.abc import Mapping
from typing import Any, TextIO

import dagster as dg

from finetune.logs import JsonLine
from finetune.redaction import Redactor
from lora_assets.settings import Settings, load_settings

# Marks the runs that happen in the process of a command, so that the next one can tell which of them were killed.
TAGS = {"lora-assets/entry": "run"}
PARTITION = "dagster/partition"
# What Dagster attaches to a record: told as fields of their own.
_ATTACHED = ("dagster_meta", "dagster_event", "dagster_event_batch_metadata")


@dg.logger(None, "One line for each message of an asset: time, asset, message; or as JSON (LOG_FORMAT).")
def console(init_context: dg.InitLoggerContext) -> logging.Logger:
    """The log of `lora-assets run`; as text without Dagster's own events, which stay in the UI."""
    settings = load_settings()
    logger = logging.Logger("lora_assets.console", logging.INFO)
    handler = _Uncaptured(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(_JsonRunLine(settings))
    else:
        handler.setFormatter(_ShortLine(settings))
        handler.addFilter(_said_by_an_asset)
    logger.addHandler(handler)
    return logger


class _Uncaptured(logging.StreamHandler[TextIO]):
    """Writes to a standard stream, also while Dagster captures what a step writes there.

    What is captured reaches the stream through a `tail`, which is ended with the step whether or not it has read the
    last lines: those that tell why the step failed.
    """

    def __init__(self, stream: TextIO) -> None:
        try:
            descriptor = os.dup(stream.fileno())
        except io.UnsupportedOperation:
            # A stream without a descriptor cannot be captured.
            super().__init__(stream)
            return
        copy = os.fdopen(descriptor, "w", encoding=stream.encoding, errors=stream.errors)
        super().__init__(copy)
        # Logging never closes the streams of its handlers.
        weakref.finalize(self, copy.close)


class RunLines(_Uncaptured):
    """JSON lines of every run that the daemon, the UI or a pod starts, on standard output; for ``dagster.yaml``.

    Silent while LOG_FORMAT is text, and of the runs of `lora-assets run`, whose log is `console`.
    """

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        settings = load_settings()
        self.setFormatter(_JsonRunLine(settings))
        self.addFilter(lambda record: settings.log_format == "json" and not _of_a_command(record))


class _JsonRunLine(JsonLine):
    def __init__(self, settings: Settings) -> None:
        super().__init__(Redactor(settings.secrets), _ATTACHED)

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        super().add_fields(log_data, record, message_dict)
        meta = _meta(record)
        event: dg.DagsterEvent | None = meta.get("dagster_event")
        fields = {
            "message": meta.get("orig_message"),
            "run_id": meta.get("run_id"),
            "date": meta.get("job_tags", {}).get(PARTITION),
            "job": meta.get("job_name"),
            "step": meta.get("step_key"),
            "event": event and event.event_type_value,
        }
        if event and event.is_step_failure and event.step_failure_data.error:
            fields["error"] = event.step_failure_data.error.to_string()
        log_data.update({name: value for name, value in fields.items() if value})


class _ShortLine(logging.Formatter):
    def __init__(self, settings: Settings) -> None:
        super().__init__("%(asctime)s %(where)-38s %(text)s", "%H:%M:%S")
        self._redact = Redactor(settings.secrets)

    def format(self, record: logging.LogRecord) -> str:
        meta = _meta(record)
        record.where = str(meta.get("step_key") or meta.get("job_name") or "")
        record.text = meta.get("orig_message", record.getMessage())
        return self._redact(super().format(record))


def _said_by_an_asset(record: logging.LogRecord) -> bool:
    meta = _meta(record)
    # That a step is left out follows from the failure or skip before it.
    return "dagster_event" not in meta and not str(meta.get("orig_message")).startswith("Dependencies for step")


def _of_a_command(record: logging.LogRecord) -> bool:
    return bool(TAGS.items() <= _meta(record).get("job_tags", {}).items())


def _meta(record: logging.LogRecord) -> Mapping[str, Any]:
    meta: Mapping[str, Any] = getattr(record, "dagster_meta", {})
    return {name: value for name, value in meta.items() if value is not None}
