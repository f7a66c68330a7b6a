"""`lora-assets experiment ablation`: what one value or another of the plan is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.search.ablation.report import AblationResult, rows_of
from finetune.search.ablation.spec import AblationSpec, arms_of, dry_run
from finetune.search.models import StepResult
from finetune.search.spec import read_spec
from lora_assets.cli.console import Json, out, plain_errors, print_json, print_table
from lora_assets.cli.tools import progress
from lora_assets.settings import load_settings


@plain_errors
def ablation(
    spec: Annotated[Path, typer.Argument(help="YAML file; docs/search.md has a table of its fields.")],
    dry: Annotated[bool, typer.Option("--dry-run", help="Price all trainings; train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Vary values of the plan one at a time, and test each against the base configuration.

    Run again after a kill, it repeats no training. Exits with 75 if trying again later may help.
    """
    chosen = read_spec(spec, AblationSpec)
    result = _price(chosen, as_json) if chosen.dry_run or dry else _run(chosen, as_json)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    if "proposed" in result.data:
        rows = [
            [row["configuration"], str(row["trainings"]), str(row["steps"]), _figure(row["gpu_hours"])]
            for row in result.data["proposed"]
        ]
        print_table("proposed", ["configuration", "trainings", "steps", "GPU-hours"], rows)
        out.print(result.output_text, markup=False)
        return
    found = rows_of(AblationResult.model_validate(result.data))
    print_table(None, list(found[0]), [[_figure(value) for value in row.values()] for row in found])
    out.print(result.metadata["conclusion"], markup=False)
    out.print(f"report: {result.artifacts[0]}", markup=False)


def _price(spec: AblationSpec, as_json: bool) -> StepResult:
    from lora_assets.cli.plan import history
    from lora_assets.laboratory import make_bench

    settings = load_settings()
    bench = make_bench(settings, spec, progress(as_json))
    measured = bench.measured(history(settings, bench.base_model.name, bench.device))
    return dry_run(spec, arms_of(spec, measured))


def _run(spec: AblationSpec, as_json: bool) -> StepResult:
    from lora_assets.ablation import run_ablation
    from lora_assets.experiments import open_study
    from lora_assets.laboratory import make_bench

    settings = load_settings()
    report = progress(as_json)
    bench = make_bench(settings, spec, report, weights=True)
    run_log = open_study(settings)
    try:
        return run_ablation(spec, bench, settings, run_log, report)
    finally:
        run_log.close()


def _figure(value: str | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
