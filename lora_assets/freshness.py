"""Which dataset dates must be made, and why: read from disk alone, so that a dry run changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune.dataset.discovery import ExportFile, window_stats
from finetune.dataset.models import PreparedDataset
from finetune.export.models import GgufExport, LmStudioExport, MergedModel, OllamaExport
from finetune.publishing import is_complete
from finetune.registry.models import RegisteredVersion
from finetune.registry.promotion import champion
from lora_assets.settings import Settings

Model = TypeVar("Model", bound=BaseModel)


class DateState(BaseModel):
    """What is to be done for one dataset date.

    ``missing``: never made whole. ``stale``: made from other inputs or settings. ``current``: nothing to do.
    """

    model_config = ConfigDict(frozen=True)

    date: str
    state: Literal["missing", "stale", "current"]
    reason: str
    files: int
    size: int


def date_states(settings: Settings, files: Sequence[ExportFile]) -> list[DateState]:
    """The state of each date that has exports, oldest first; `files` as `discover_exports` returns them."""
    reigning = champion(settings.layout.registry)
    stats = window_stats(files, settings.dataset_window)
    numbers = Counter(file.date for file in files)
    sizes: Counter[str] = Counter()
    for file in files:
        sizes[file.date] += file.size
    judged = {date: _judge(settings, date, stat.fingerprint, reigning) for date, stat in stats.items()}
    return [
        DateState(date=date, state=state, reason=reason, files=numbers[date], size=sizes[date])
        for date, (state, reason) in judged.items()
    ]


def choose_dates(states: Sequence[DateState], *, every: bool = False, latest: bool = False) -> list[str]:
    """The dates to make, oldest first.

    Args:
        states: of all dates, oldest first.
        every: all that are missing or stale; else all that are missing, and of the stale ones the newest,
            since it covers what changed before it.
        latest: only the newest date, and only if it is not current.
    """
    if latest:
        states = states[-1:]
    missing = [state.date for state in states if state.state == "missing"]
    stale = [state.date for state in states if state.state == "stale"]
    return sorted(missing + (stale if every else stale[-1:]))


def _judge(
    settings: Settings, date: str, stat_fingerprint: str, reigning: RegisteredVersion | None
) -> tuple[Literal["missing", "stale", "current"], str]:
    prepared = read_value(settings, "merged_dataset", date, PreparedDataset)
    version = read_value(settings, "registered_adapter", date, RegisteredVersion)
    if prepared is None:
        return "missing", "never prepared"
    if version is None:
        return "missing", "prepared, but not trained to the end"
    if prepared.stat_fingerprint != stat_fingerprint:
        return "stale", "exports of its window were added or changed"
    if not is_complete(prepared.path) or version.lineage.get("dataset_fingerprint") != prepared.fingerprint:
        return "stale", "its adapter was trained on another dataset"
    if version.lineage.get("recipe") != settings.recipe:
        return "stale", "settings of the training changed"
    if reigning is None or reigning.version != version.version:
        return "current", f"{version.version}, not the champion"
    if reason := _export_missing(settings, date, version.run_id):
        return "stale", f"champion, but {reason}"
    return "current", f"{version.version}, champion"


def _export_missing(settings: Settings, date: str, run_id: str) -> str | None:
    """Why the champion's exports are not those that the settings ask for, or None if they are."""
    merged = read_value(settings, "merged_model", date, MergedModel)
    if merged is None or merged.run_id != run_id or not is_complete(merged.path):
        return "not exported: merged_model"
    return _gguf_missing(settings, date, run_id) if settings.needs_gguf else None


def _gguf_missing(settings: Settings, date: str, run_id: str) -> str | None:
    gguf = read_value(settings, "gguf", date, GgufExport)
    if gguf is None or gguf.run_id != run_id or not is_complete(gguf.path):
        return "not exported: gguf"
    if gguf.quantized.quantization != settings.gguf_quantization:
        return f"exported as {gguf.quantized.quantization}, not {settings.gguf_quantization} (GGUF_QUANTIZATION)"
    if "ollama" in settings.targets:
        ollama = read_value(settings, "modelfile", date, OllamaExport)
        if ollama is None or ollama.path != settings.layout.model(run_id, "ollama") or not is_complete(ollama.path):
            return "not exported: modelfile"
        if settings.ollama_host and ollama.created_model != f"{settings.ollama_model_name}:{run_id}":
            return "not created on OLLAMA_HOST"
    if "lmstudio" in settings.targets:
        lmstudio = read_value(settings, "lmstudio_export", date, LmStudioExport)
        path = settings.layout.model(run_id, "lmstudio")
        if lmstudio is None or lmstudio.path != path or not is_complete(path):
            return "not exported: lmstudio_export"
        if not lmstudio.gguf.is_relative_to(path / settings.lmstudio_publisher):
            return "not exported for LMSTUDIO_PUBLISHER"
    return None


def read_value(settings: Settings, asset: str, date: str, model: type[Model]) -> Model | None:
    """What an asset returned for a date, or None if it never did or the value's format has changed since."""
    path = settings.layout.asset_values / settings.pipeline_name / asset / f"{date}.json"
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
