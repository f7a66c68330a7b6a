"""`lora-assets experiment continual`: what going on from a champion costs, beside training from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.search.continual.comparison import PARTS, ContinualResult, ContinualSpec
from finetune.search.spec import read_spec
from lora_assets.cli.console import Json, out, plain_errors, print_json, print_table
from lora_assets.cli.tools import progress
from lora_assets.settings import load_settings


@plain_errors
def continual(
    spec: Annotated[Path, typer.Argument(help="YAML file; docs/search.md has a table of its fields.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and price the trainings; train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Go on from a champion, train from scratch, and compare the losses on old and new data.

    What was made before is not made again. Exits with 75 if trying again later may help.
    """
    from lora_assets.continual import of_settings, propose, run_continual
    from lora_assets.experiments import open_study
    from lora_assets.laboratory import Laboratory, make_bench

    settings = load_settings()
    report = progress(as_json)
    chosen = of_settings(read_spec(spec, ContinualSpec), settings)
    if chosen.dry_run or dry_run:
        from lora_assets.cli.plan import history

        name = chosen.base_model or settings.base_model_name
        # Only its weights tell whether a local model is the one that the champion was trained on.
        bench = make_bench(settings, chosen, report, weights=name is None or Path(name).expanduser().is_dir())
        result = propose(settings, chosen, bench.measured(history(settings, bench.base_model.name, bench.device)))
    else:
        bench = make_bench(settings, chosen, report, weights=True)
        store = open_study(settings)
        try:
            result = run_continual(Laboratory(bench, settings, store, "continual"), chosen, report)
        finally:
            store.close()
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        _print(result)


def _print(result: ContinualResult) -> None:
    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [
        [
            arm.name,
            *(figure(arm.loss.get(part), ".4f") for part in PARTS),
            figure(arm.records, "d"),
            figure(arm.steps, "d"),
            figure(arm.tokens, "d"),
            figure(arm.gpu_hours, ".3g"),
            arm.run_id or "",
        ]
        for arm in result.arms
    ]
    heads = ["model", "loss on old data", "on new data", "records", "steps", "tokens", "GPU-hours", "run"]
    print_table(None, heads, rows)
    out.print(result.conclusion, markup=False)
    if result.path:
        out.print(f"report: {result.path / 'report.html'}", markup=False)
