"""`lora-assets migrate`: the schema of the run log, before anything needs it."""

from __future__ import annotations

from lora_assets.cli.console import Json, out, plain_errors, print_json


@plain_errors
def migrate(as_json: Json = False) -> None:
    """Bring the run log's tables to this version, under a lock; a second time it changes nothing.

    Every command does so when it connects. A deployment does it first, so that a database that refuses is
    known before a training is.
    """
    from lora_assets.definitions import open_run_log
    from lora_assets.settings import load_settings

    with open_run_log(load_settings()) as log:
        log.recent(1)
    if as_json:
        print_json({"status": "completed"})
    else:
        out.print("the run log's tables are those of this version")
