"""Modelfiles for Ollama."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ArtifactError
from finetune.export.chat_format import ChatFormat, read_chat_format
from finetune.export.modelfile_grammar import Command, format_modelfile, parse_modelfile
from finetune.export.models import GgufExport, OllamaExport
from finetune.publishing import is_complete, publish_directory, read_manifest

if TYPE_CHECKING:
    from finetune.base_model.models import BaseModelRef

KIND = "ollama"
MODELFILE = "Modelfile"
MODELFILE_MERGED = "Modelfile.merged"
# Ollama reserves the cache for the whole context at once: a model's 128k would fill a workstation's memory.
MAX_CONTEXT = 8192


def write_modelfiles(
    *, gguf: GgufExport, base_model: BaseModelRef, output_dir: Path, run_id: str, system: str | None = None
) -> OllamaExport:
    """Write ``Modelfile`` (base GGUF + adapter GGUF, where there is one) and ``Modelfile.merged`` (merged GGUF).

    Paths in them are relative to their directory, so a data root can be moved as a whole. TEMPLATE and
    stop tokens come from the base model's own chat template, num_ctx from its configuration.

    Args:
        gguf: the verified GGUF files.
        base_model: the base, whose template is used.
        output_dir: where both are published; reused when complete and made of the same inputs.
        run_id: the training's id.
        system: a system prompt to build in.

    Raises:
        ExportError: the chat template has no equal in Ollama, or the system prompt cannot be written.
        StorageFullError: the disk is full.
    """
    result = OllamaExport(
        path=output_dir,
        modelfile=None if gguf.adapter is None else output_dir / MODELFILE,
        modelfile_merged=output_dir / MODELFILE_MERGED,
        created_model=None,
    )
    sources = {MODELFILE_MERGED: {"from": gguf.quantized}}
    if gguf.adapter is not None:
        sources[MODELFILE] = {"from": gguf.base, "adapter": gguf.adapter}
    paths = {
        name: {command: _relative(file.path, output_dir) for command, file in files.items()}
        for name, files in sources.items()
    }
    inputs = {
        "base_model": base_model.fingerprint,
        "files": {name: [file.sha256 for file in files.values()] for name, files in sources.items()},
        # Relative paths say whether the files still lie where the Modelfiles look for them.
        "paths": paths,
        "system": system,
    }
    if _is_same(output_dir, inputs):
        return result.model_copy(update={"reused": True})
    chat = read_chat_format(base_model.path)
    common = [Command("template", go_template(chat))]
    common += [Command("stop", stop) for stop in chat.stops]
    common += [Command("num_ctx", str(context_length(base_model.path)))]
    common += [Command("system", system)] if system else []
    with publish_directory(output_dir, kind=KIND) as staging:
        for name, files in paths.items():
            text = format_modelfile([*(Command(command, path) for command, path in files.items()), *common])
            (staging.path / name).write_text(text, encoding="utf-8", newline="")
        staging.inputs = inputs
        staging.parameters = {"run_id": run_id, "base_model": base_model.name}
    return result


def read_modelfile(path: Path) -> list[Command]:
    """The commands of a Modelfile on disk, FROM and ADAPTER as absolute paths.

    Raises:
        ExportError: not a Modelfile.
    """
    return [
        Command(command.name, str((path.parent / command.value).resolve()))
        if command.name in ("from", "adapter")
        else command
        for command in parse_modelfile(path.read_text(encoding="utf-8"))
    ]


def go_template(chat: ChatFormat) -> str:
    """A chat format as a Go template over Ollama's ``.System`` and ``.Messages``.

    Ollama hands over system turns both ways; the range passes them by. An answer that is last is left
    open, to be continued.
    """
    system, user, assistant = chat.system, chat.user, chat.assistant
    parts = [
        "{{ if .System }}", _literal(system.before), "{{ .System }}", _literal(system.after),
        "{{ else }}", _literal(chat.no_system), "{{ end }}",
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}",
        '{{ if eq .Role "user" }}', _literal(user.before), "{{ .Content }}", _literal(user.after),
        '{{ else if eq .Role "assistant" }}', _literal(assistant.before), "{{ .Content }}",
        "{{ if not $last }}", _literal(assistant.after), "{{ end }}{{ end }}",
        '{{ if and $last (ne .Role "assistant") }}', _literal(chat.generation), "{{ end }}{{ end }}",
    ]  # fmt: skip
    return "".join(parts)


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def context_length(model_path: Path) -> int:
    """The model's context in tokens, at most `MAX_CONTEXT`."""
    config = json.loads((model_path / "config.json").read_bytes())
    return min(int(config.get("max_position_embeddings", MAX_CONTEXT)), MAX_CONTEXT)


def _relative(file: Path, directory: Path) -> str:
    return Path(os.path.relpath(file, directory)).as_posix()


def _is_same(output_dir: Path, inputs: Mapping[str, object]) -> bool:
    if not is_complete(output_dir):
        return False
    try:
        return read_manifest(output_dir, kind=KIND).inputs == inputs
    except ArtifactError:
        return False
