"""`lora-assets experiment curriculum`: stages in order, and the same data shuffled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.search.curriculum.spec import read_curriculum
from finetune.search.models import StepResult
from lora_assets.cli.console import Json, out, plain_errors, print_json, print_table
from lora_assets.cli.tools import progress
from lora_assets.settings import load_settings


@plain_errors
def curriculum(
    spec: Annotated[Path, typer.Argument(help="YAML file; docs/search.md has a table of its fields.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Price all trainings; train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train one adapter through stages in order, and compare it with the same data shuffled.

    Run it again after a kill: nothing is repeated. Exits with 75 if trying again later may help.
    """
    from lora_assets.cli.plan import history
    from lora_assets.curriculum import open_curriculum, price_curriculum, run_curriculum
    from lora_assets.definitions import open_run_log
    from lora_assets.laboratory import make_bench

    settings, chosen, report = load_settings(), read_curriculum(spec), progress(as_json)
    dry_run = dry_run or chosen.dry_run
    model = chosen.base_model or settings.base_model_name
    # A local model is known by its weights, and so are the losses that were measured with it.
    local = model is None or Path(model).expanduser().is_dir()
    bench = make_bench(settings, chosen, report, weights=local or not dry_run)
    bench = bench.measured(history(settings, bench.base_model.name, bench.device))
    opened = open_curriculum(settings, chosen, bench, report)
    if dry_run:
        result = price_curriculum(settings, opened, report)
    else:
        with open_run_log(settings) as run_log:
            result = run_curriculum(settings, opened, run_log, report)
        if not as_json:
            out.print(f"report: {settings.layout.experiment(opened.name) / 'report.html'}", markup=False)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    _show(result)


def _show(result: StepResult) -> None:
    if result.metadata["status"] == "dry_run":
        rows = result.data["proposed"]
        shown = ["stage", "records", "replayed", "difficulty", "epochs", "learning_rate", "steps", "gpu_hours", "price"]
    else:
        rows = [*result.data["stages"], result.data["shuffled"]]
        shown = ["name", "records", "replayed", "epochs", "learning_rate", "steps", "eval_loss", "change", "run_id"]
    print_table(
        None, [name.replace("_", " ") for name in shown], [[_cell(row[name]) for name in shown] for row in rows]
    )
    out.print(result.output_text.splitlines()[-1], markup=False)
    if result.artifacts:
        out.print(f"adapter: {result.artifacts[0]}", markup=False)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
