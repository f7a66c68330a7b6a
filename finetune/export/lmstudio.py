"""The merged GGUF in LM Studio's folder layout."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ArtifactError, ExportError
from finetune.export.chat_format import read_chat_format
from finetune.export.gguf_facts import read_gguf_facts
from finetune.export.model_yaml import model_yaml
from finetune.export.modelfile import MAX_CONTEXT
from finetune.export.models import GgufExport, LmStudioExport
from finetune.publishing import canonical_json, is_complete, publish_directory, read_manifest, write_json_atomically

if TYPE_CHECKING:
    from finetune.base_model.models import BaseModelRef

KIND = "lmstudio"
CONFIG_NAME = "lmstudio_config.json"
MODEL_YAML = "model.yaml"
_NOTE = (
    "Written by lora-assets for people and programs that want these facts. LM Studio itself does not read this file: "
    "it reads the GGUF file's own metadata."
)


def export_lmstudio(
    *,
    gguf: GgufExport,
    base_model: BaseModelRef,
    output_dir: Path,
    run_id: str,
    publisher: str,
    hub_repo: str | None = None,
) -> LmStudioExport:
    """Publish ``<publisher>/<model>/<file>.gguf``, ``model.yaml``, ``lmstudio_config.json`` and a README.

    LM Studio loads no LoRA adapters, so the model is the merged, quantized GGUF; it is linked, not
    copied, where the file system allows.

    Args:
        gguf: the verified GGUF files.
        base_model: the base model.
        output_dir: where they are published; reused when complete and made of the same inputs.
        run_id: the training's id, part of the model's name.
        publisher: the name of the publisher's folder.
        hub_repo: ``owner/name`` on the hub where the GGUF is pushed, for ``model.yaml``.

    Raises:
        ExportError: the publisher's name is no folder name.
        StorageFullError: the disk is full.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", publisher):
        raise ExportError(
            f"{publisher!r} cannot be a publisher's folder", remedy="Use letters, digits, dots, hyphens and underscores"
        )
    model = f"{_slug(base_model.name)}-{run_id}"
    relative = Path(publisher) / model / f"{model}-{gguf.quantized.quantization}.gguf"
    result = LmStudioExport(path=output_dir, gguf=output_dir / relative, config=output_dir / CONFIG_NAME)
    inputs = {"gguf": gguf.quantized.sha256, "publisher": publisher, "model": model, "hub_repo": hub_repo}
    if _is_same(output_dir, inputs):
        return result.model_copy(update={"reused": True})
    with publish_directory(output_dir, kind=KIND) as staging:
        target = staging.path / relative
        target.parent.mkdir(parents=True)
        _link_or_copy(gguf.quantized.path, target)
        config = _config(gguf, base_model, run_id, relative)
        write_json_atomically(staging.path / CONFIG_NAME, config)
        (staging.path / MODEL_YAML).write_text(model_yaml(config, hub_repo=hub_repo), encoding="utf-8")
        (staging.path / "README.md").write_text(_readme(config), encoding="utf-8")
        staging.inputs = inputs
    return result


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)


def _config(gguf: GgufExport, base_model: BaseModelRef, run_id: str, relative: Path) -> dict[str, Any]:
    facts = read_gguf_facts(gguf.quantized.path)
    context = min(facts["context_length"] or MAX_CONTEXT, MAX_CONTEXT)
    checked = gguf.verification
    return {
        "schema_version": 1,
        "note": _NOTE,
        "model": {
            "file": relative.as_posix(),
            "sha256": gguf.quantized.sha256,
            "size": gguf.quantized.size,
            "quantization": gguf.quantized.quantization,
            "gguf": facts,
        },
        "provenance": {
            "run_id": run_id,
            "base_model": base_model.name,
            "base_model_revision": base_model.revision,
            "base_model_fingerprint": base_model.fingerprint,
        },
        "verification": {
            "tokenization_equal": checked.tokenization_equal,
            "greedy_agreement": checked.greedy_agreement.get(gguf.quantized.quantization),
            "divergence_nats_per_token": checked.divergence.get(gguf.quantized.quantization),
            "sample": {"question": checked.sample_question, "answer": checked.sample_answer},
        },
        "suggested": {
            "load": {"context_length": context, "gpu_offload": "max"},
            "prediction": {"temperature": 0.0, "stop_strings": read_chat_format(base_model.path).stops},
        },
        "import": {
            "command": ["lms", "import", relative.as_posix(), "--user-repo", "/".join(relative.parts[:2]), "--copy"],
            "by_hand": f"copy the folder {relative.parts[0]} into LM Studio's models folder",
        },
    }


def _readme(config: dict[str, Any]) -> str:
    model, provenance, sample = config["model"], config["provenance"], config["verification"]["sample"]
    command = " ".join(config["import"]["command"])
    return f"""# {Path(model["file"]).stem}

{provenance["base_model"]} with the adapter of training {provenance["run_id"]} merged in, as
{model["quantization"]} GGUF ({model["size"]:,} bytes, SHA-256 `{model["sha256"]}`).

## Load it in LM Studio

Either run, in this directory,

    {command}

or {config["import"]["by_hand"]} (LM Studio shows its place under My Models). The model then appears under My Models.
The chat template is part of the GGUF file, so there is nothing to set.

LM Studio loads no LoRA adapters: this is the merged model. `{CONFIG_NAME}` beside this file holds facts and
suggested settings for people and programs; LM Studio does not read it. `{MODEL_YAML}` says the same in LM Studio's own
format, for its catalogue of models: it is needed only by who publishes the model there.

## Try it

> {sample["question"]}

{sample["answer"]}
"""


def _is_same(output_dir: Path, inputs: dict[str, Any]) -> bool:
    if not is_complete(output_dir):
        return False
    try:
        return canonical_json(read_manifest(output_dir, kind=KIND).inputs) == canonical_json(inputs)
    except ArtifactError:
        return False
