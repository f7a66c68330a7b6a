"""HTML pages that need nothing beside them, and the files that every report has."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel

from finetune.reproduction.manifest import write_manifest
from finetune.reproduction.models import ExperimentManifest


def render_page(template: str, *, plots: Mapping[str, bytes], captions: Mapping[str, str], **values: Any) -> str:
    """A page from a template of this package, which extends ``page.html.jinja``.

    Args:
        template: its path within the package.
        plots: pictures as PNG, by file name.
        captions: what each picture shows, by its file name.
        values: what else the template names; one that is missing is an error.
    """
    environment = Environment(
        loader=PackageLoader("finetune.search", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = {file: base64.b64encode(picture).decode() for file, picture in plots.items()}
    return environment.get_template(template).render(plots=pictures, captions=captions, **values)


def write_report(
    directory: Path,
    *,
    plots: Mapping[str, bytes],
    page: str,
    result: BaseModel,
    manifest: ExperimentManifest,
    result_name: str = "report.json",
) -> None:
    """Write pictures, ``report.html``, the result as JSON and the manifest into a directory that is being published."""
    for file, picture in plots.items():
        (directory / file).write_bytes(picture)
    (directory / "report.html").write_text(page, encoding="utf-8")
    (directory / result_name).write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_manifest(directory, manifest)
