"""`lora-assets config` and `lora-assets runs`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lora_assets.cli.console import Json, out, plain_errors, print_json, print_table


@plain_errors
def config(as_json: Json = False) -> None:
    """Print the configuration in force and where each value came from; secrets are masked."""
    from lora_assets.settings import is_secret, load_settings, sources

    settings = load_settings()
    origin = sources(settings)
    # What an unset variable stands for.
    derived = {"exports_dir": settings.exports, "exports_pattern": settings.pattern, "train_device": settings.device}
    rows: list[dict[str, Any]] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        shown = "********" if value is not None and is_secret(field) else derived.get(name, value)
        rows.append({"variable": name.upper(), "value": shown, "source": origin[name], "meaning": field.description})
    if as_json:
        print_json(rows)
        return
    print_table(
        None,
        ["variable", "value", "source"],
        [[r["variable"], "" if r["value"] is None else str(r["value"]), r["source"]] for r in rows],
    )


@plain_errors
def runs(
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """Show the run log: every training with its backend, status and main figures."""
    from lora_assets.definitions import open_run_log
    from lora_assets.settings import load_settings

    with open_run_log(load_settings()) as log:
        rows = log.recent(limit)
    if as_json:
        print_json([row.model_dump(mode="json") | {"backend_label": row.backend_label} for row in rows])
        return
    if not rows:
        out.print("no training yet")
        return
    print_table(
        None,
        ["id", "date", "status", "training", "started", "time", "loss", "run, or what went wrong"],
        [
            [
                str(row.id),
                row.dataset_date or "",
                row.status,
                row.backend_label,
                f"{row.started_at:%m-%d %H:%M}",
                "" if row.seconds is None else f"{row.seconds:.0f} s",
                f"{row.metrics['final_loss']:.4f}" if "final_loss" in row.metrics else "",
                row.error_message or row.training_run_id or row.adapter_path or "",
            ]
            for row in rows
        ],
    )
