"""`lora-assets export-samples`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import ConfigurationError
from lora_assets.cli.console import Json, plain_errors
from lora_assets.cli.tools import progress, show
from lora_assets.settings import load_settings

FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]


@plain_errors
def export_samples(
    since: Annotated[datetime, typer.Option(formats=FORMATS, help="First moment; without a zone it is UTC.")],
    until: Annotated[
        datetime | None, typer.Option(formats=FORMATS, help="The moment after the last; default: today, 00:00 UTC.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory; default: the exports directory.")] = None,
    as_json: Json = False,
) -> None:
    """Write the samples of a table in PostgreSQL into a dated JSONL file among the exports."""
    from resources.postgres import database_url
    from resources.samples import SamplesTable, export_name
    from resources.samples import export_samples as export

    settings = load_settings()
    first = _zoned(since)
    end = _zoned(until) if until else datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    name = export_name(settings.pipeline_name, first, end)
    if output is None and not Path(name).match(settings.pattern):
        raise ConfigurationError(
            f"no export is looked for under the name {name}",
            where=f"EXPORTS_PATTERN={settings.pattern}",
            remedy="Widen the pattern, or name another directory with --output",
        )
    table = SamplesTable(
        name=settings.samples_table, columns=settings.sample_columns, time_column=settings.samples_time_column
    )
    with database_url(settings.samples_url, settings.layout.postgres) as url:
        path = (output.absolute() if output else settings.exports) / name
        result = export(url, path, table, since=first, until=end, on_progress=progress(as_json))
    show(result, as_json)


def _zoned(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
