"""`lora-assets experiment ensemble`: several adapters combined into one, and published if that is better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.search.ensemble.result import EnsembleResult, Member
from finetune.search.ensemble.spec import EnsembleSpec
from finetune.search.spec import read_spec
from lora_assets.cli.console import Json, out, plain_errors, print_json, print_table
from lora_assets.cli.tools import progress
from lora_assets.settings import Settings, load_settings


@plain_errors
def ensemble(
    spec: Annotated[Path, typer.Argument(help="YAML file; docs/search.md has a table of its fields.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and price all members; train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train diverse adapters and combine them into one, which is published if it is better than the best of them.

    Run again after a kill: no training is repeated. Exits with 75 if trying again later may help.
    """
    chosen, settings = read_spec(spec, EnsembleSpec), load_settings()
    result = (_propose if dry_run or chosen.dry_run else _run)(chosen, settings, as_json)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    columns = ["member", "weight", "selection loss", "judging loss", "steps", "GPU-hours", "price", "run, or fault"]
    print_table(None, columns, [_row(member) for member in result.members])
    out.print(f"{result.status.replace('_', ' ')}: {result.reason}", markup=False)
    if result.adapter_path:
        out.print(f"adapter: {result.adapter_path}", markup=False)
    if result.path:
        out.print(f"report: {result.path / 'report.html'}", markup=False)


def _propose(spec: EnsembleSpec, settings: Settings, quiet: bool) -> EnsembleResult:
    from lora_assets.cli.plan import history
    from lora_assets.ensembles import propose
    from lora_assets.laboratory import make_bench

    bench = make_bench(settings, spec, progress(quiet))
    return propose(spec, bench.measured(history(settings, bench.base_model.name, bench.device)))


def _run(spec: EnsembleSpec, settings: Settings, quiet: bool) -> EnsembleResult:
    from lora_assets.definitions import open_run_log
    from lora_assets.ensembles import run_ensemble
    from lora_assets.laboratory import Laboratory, make_bench

    bench = make_bench(settings, spec, progress(quiet), weights=True)
    exports = spec.dataset_path.parent if spec.dataset_path else None
    with open_run_log(settings) as run_log:
        laboratory = Laboratory(
            bench,
            settings,
            run_log,
            spec.name(bench.dataset.fingerprint, bench.base_model.fingerprint),
            exports=exports,
        )
        return run_ensemble(laboratory, spec, progress(quiet))


def _row(member: Member) -> list[str]:
    figures = member.evaluated.figures if member.evaluated else None
    return [
        member.name,
        f"{member.weight:.4f}" if figures else "",
        f"{figures.selection_loss:.4f}" if figures else "",
        f"{figures.judging_loss:.4f}" if figures else "",
        "" if member.training_steps is None else str(member.training_steps),
        "" if member.gpu_hours is None else f"{member.gpu_hours:.3g}",
        "" if member.price is None else f"{member.price:.3g}",
        member.fault or member.run_id,
    ]
