"""HTML pages that need nothing beside them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


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
