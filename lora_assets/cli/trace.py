"""`lora-assets trace`: from a figure of a report back to the data that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_assets.cli.console import Json, err, out, plain_errors, print_json, print_table
from lora_assets.cli.reproduce import places_of
from lora_assets.settings import load_settings


@plain_errors
def trace(
    report: Annotated[Path, typer.Argument(help="Directory of a report, an evaluation or a version, or a file in it.")],
    figure: Annotated[str | None, typer.Argument(help="A figure of it; without one, all of them.")] = None,
    as_json: Json = False,
) -> None:
    """Follow figures back: evaluation, adapter, training, dataset, exports; each hash on the way is compared.

    A model that an experiment has merged is compared with its hashes too. Exit code 1 where a link is missing or has
    changed, or the merged model has changed.
    """
    from finetune.reproduction.trace import trace as follow

    traced = follow(report, places_of(load_settings()), figure=figure)
    broken = set(traced.broken)
    if as_json:
        print_json({**traced.model_dump(mode="json"), "broken": traced.broken})
    else:
        rows = [
            [
                name,
                "picture" if each.value is None else f"{each.value:.6g}",
                ", ".join(each.runs),
                "broken" if name in broken else "whole",
            ]
            for name, each in traced.figures.items()
        ]
        print_table("figures", ["figure", "value", "computed from", "way back"], rows)
        for run, chain in traced.chains.items():
            rows = [
                [link.kind, link.name, link.expected[:12], link.state, link.reason or str(link.path or "")]
                for link in chain.links
            ]
            print_table(run, ["link", "name", "SHA-256 or fingerprint", "state", "where, or what is wrong"], rows)
        if merged := traced.merged:
            out.print(
                f"the merged model of {merged.name} is {merged.state}: {merged.reason or merged.path or 'removed'}",
                markup=False,
            )
        if traced.report.state != "present":
            err.print(f"the report was altered: {traced.report.reason}", style="red", markup=False)
        out.print(f"{len(broken)} of {len(traced.figures)} figures have a broken way back", markup=False)
    # One that was removed to make room can be merged again.
    if broken or (traced.merged is not None and traced.merged.state == "changed"):
        raise typer.Exit(1)
