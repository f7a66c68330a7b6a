"""An ensemble's result, as JSON and as one HTML page that needs nothing beside it, and the combined adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import ValidationError

from finetune.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_hash
from finetune.base_model.card import base_model_line, read_licence
from finetune.base_model.models import BaseModelRef
from finetune.errors import ArtifactError
from finetune.publishing import is_complete, publish_directory, read_manifest
from finetune.reproduction.models import ExperimentManifest
from finetune.search.ensemble.plots import losses_png, soup_png
from finetune.search.ensemble.result import EnsembleResult
from finetune.search.page import render_page, write_report
from finetune.training.attempt import KIND as ADAPTER_KIND

KIND = "ensemble"
CAPTIONS = {
    "losses.png": "Losses on the judging half, with 95 % intervals over records",
    "soup.png": "The greedy soup: its loss on the selection half with each member that was tried",
}


def publish_report(directory: Path, result: EnsembleResult, manifest: ExperimentManifest) -> None:
    """Publish ``report.json``, ``report.html``, the pictures and the manifest.

    Raises:
        StorageFullError: the disk is full.
    """
    plots = {"losses.png": losses_png(result)}
    if len(result.tastes) > 1:
        plots["soup.png"] = soup_png(result)
    page = render_page("ensemble/report.html.jinja", plots=plots, captions=CAPTIONS, result=result)
    with publish_directory(directory, kind=KIND) as staging:
        write_report(staging.path, plots=plots, page=page, result=result, manifest=manifest)
        staging.inputs = {"dataset": result.dataset_fingerprint, "base_model": result.base_fingerprint}
        staging.parameters = result.spec.model_dump(mode="json")
        staging.results = {"status": result.status, "reason": result.reason}


def read_report(directory: Path) -> EnsembleResult | None:
    """The result that is there already, if it is whole and its adapter is, and no training failed; else None."""
    if not is_complete(directory):
        return None
    try:
        read_manifest(directory, kind=KIND, verify="hashes")
        result = EnsembleResult.model_validate_json((directory / "report.json").read_bytes())
        if result.adapter_path is not None:
            read_manifest(result.adapter_path, kind=ADAPTER_KIND, verify="hashes")
    except (ArtifactError, ValidationError):
        return None
    if any(member.fault and member.adapter_path is None for member in result.members):
        return None
    return result.model_copy(update={"path": directory, "reused": True})


def publish_combination(source: Path, target: Path, result: EnsembleResult, base_model: BaseModelRef) -> None:
    """Publish the combined adapter with its card, as trainings publish theirs.

    Args:
        source: its directory as PEFT wrote it.
        target: where.
        result: what it is a combination of, and how it was judged.
        base_model: the members'.

    Raises:
        StorageFullError: the disk is full.
    """
    with publish_directory(target, kind=ADAPTER_KIND) as staging:
        for file in (WEIGHTS_NAME, CONFIG_NAME):
            shutil.copyfile(source / file, staging.path / file)
        (staging.path / "README.md").write_text(_card(result, base_model), encoding="utf-8")
        staging.inputs = {
            "dataset": result.dataset_fingerprint,
            "base_model": base_model.model_dump(exclude={"path"}, mode="json"),
            "members": [
                {
                    "run_id": member.run_id,
                    "adapter_hash": member.evaluated.adapter_hash,
                    "dataset": member.dataset_fingerprint,
                    "weight": member.weight,
                }
                for member in result.members
                if member.evaluated and member.weight
            ],
        }
        staging.parameters = result.spec.model_dump(mode="json")
        staging.results = {
            "run_id": result.name,
            "adapter_hash": adapter_hash(staging.path),
            "verdict": result.verdict.model_dump(mode="json") if result.verdict else None,
        }


def _card(result: EnsembleResult, base_model: BaseModelRef) -> str:
    rows = "\n".join(
        f"| {member.name} | `{member.run_id}` | {member.weight:.4f} |" for member in result.members if member.weight
    )
    revision = f" (revision `{base_model.revision}`)" if base_model.revision else ""
    return f"""---
{base_model_line(base_model.name)}library_name: peft
pipeline_tag: text-generation
license: {read_licence(base_model.path)}
tags:
- lora-assets
- {result.spec.method}
---

# {result.name}

An ensemble of LoRA adapters for `{base_model.name}`{revision}, combined into one by PEFT's \
`{result.spec.combination}` with weights by `{result.spec.weighting}`.

| member | training | weight |
| --- | --- | --- |
{rows}

{result.reason[:1].upper()}{result.reason[1:]}.
"""
