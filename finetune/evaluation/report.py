"""The evaluation as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from finetune.base_model.models import BaseModelRef
from finetune.evaluation.models import EvalReport
from finetune.evaluation.statistics import normalised


def render_report(report: EvalReport, *, base_model: BaseModelRef, dataset: Path, plots: Mapping[str, bytes]) -> str:
    """HTML with inline style and pictures; every text from the data is escaped.

    Args:
        report: what the evaluation found.
        base_model: named in the heading.
        dataset: the held-out records' file.
        plots: PNG pictures by file name.
    """
    environment = Environment(
        loader=PackageLoader("finetune.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = lambda value: f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")
    environment.globals["matches"] = lambda answer, reference: normalised(answer) == normalised(reference)
    return environment.get_template("report.html.jinja").render(
        report=report,
        base_model=base_model,
        dataset=dataset,
        plots={name: base64.b64encode(picture).decode() for name, picture in plots.items()},
    )
