"""`lora-assets dataset deletions`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import ConfigurationError
from lora_assets.cli.console import Json, out, plain_errors, print_json, print_table
from lora_assets.settings import load_settings


@plain_errors
def deletions(
    entries: Annotated[
        Path | None, typer.Option("--list", help="Ids and content hashes, one a line; default: DELETION_LIST.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell which published datasets hold what is on the deletion list, and which versions learned it."""
    from finetune.dataset.deletions import find_deletable, read_deletions, versions_trained_on, with_contents
    from finetune.dataset.discovery import discover_exports
    from finetune.registry.descent import with_descendants
    from finetune.registry.store import list_versions

    settings = load_settings()
    path = entries or settings.deletion_list
    if path is None:
        raise ConfigurationError("no deletion list is named", where="DELETION_LIST", remedy="Set it, or give --list")
    listed = read_deletions(path)
    if settings.exports.is_dir():
        listed = with_contents(listed, discover_exports(settings.exports, settings.pattern), settings.id_field)
    versions = list_versions(settings.layout.registry)
    found = find_deletable(settings.layout, listed, versions, id_field=settings.id_field)
    trained = with_descendants(versions_trained_on(found), versions)
    if as_json:
        print_json({"versions": trained, "datasets": [each.model_dump(mode="json") for each in found]})
        return
    print_table(
        None,
        ["dataset", "trained on", "held out", "versions"],
        [
            [str(each.path), str(len(each.train_lines)), str(len(each.eval_lines)), ", ".join(each.versions)]
            for each in found
        ],
    )
    out.print(f"versions that learned what is on the list: {', '.join(trained) or 'none'}", markup=False)
