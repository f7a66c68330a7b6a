"""`lora-assets demo` and `lora-assets dev`."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.dataset.discovery import ExportFile, discover_exports
from finetune.errors import DatasetError
from finetune.progress import ProgressEvent
from finetune.publishing import temporary_sibling
from lora_assets.cli.console import Json, err, out, plain_errors, print_json, print_table

if TYPE_CHECKING:
    from lora_assets.outcome import DateOutcome
    from lora_assets.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples" / "exports"

# The demo differs from production only in its size: these fit a model of 2.5 million parameters and a few
# hundred short records. What the environment sets already is kept.
DEMO_SETTINGS = {
    # Layers this small gain nothing from more threads.
    "OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1)),
    "DATA_ROOT": "data/demo",
    "LORA_RANK": "16",
    "TRAIN_EPOCHS": "6",
    "LEARNING_RATE": "3e-3",
    "MICRO_BATCH": "8",
    "ACCUMULATION": "1",
    "MAX_LENGTH": "256",
    "MAX_LINE_BYTES": "65536",
    "MAX_REJECT_RATE": "0.2",
}
QUESTIONS = 3


@plain_errors
def demo(
    exports: Annotated[
        Path,
        typer.Option(
            help="A directory of exports to play the loop's output.", show_default="examples/exports of the source tree"
        ),
    ] = EXAMPLES,
    as_json: Json = False,
) -> None:
    """Run the whole loop on the example exports, date after date, as they would arrive."""
    if as_json:
        # Standard output is the document's alone.
        out.file = sys.stderr
    for name, value in DEMO_SETTINGS.items():
        os.environ.setdefault(name, value)
    from lora_assets.settings import load_settings

    settings = load_settings()
    started = time.monotonic()
    out.print("Settings of the demo: " + ", ".join(f"{name}={os.environ[name]}" for name in DEMO_SETTINGS))
    files = discover_exports(exports, settings.pattern)
    if not files:
        raise DatasetError(f"no file is named {settings.pattern}", where=exports, remedy="Pass --exports DIRECTORY")
    _prepare_base_model(settings)
    outcomes = _play(settings, files)
    if as_json:
        print_json({"runs": [outcome.model_dump() for outcome in outcomes], "seconds": time.monotonic() - started})
    else:
        _conclude(settings, outcomes)
    out.print(f"\nThe demo took {time.monotonic() - started:.0f} s. Run it again: what is unchanged is reused.")
    if any(outcome.status == "FAILURE" for outcome in outcomes):
        raise typer.Exit(1)


def _prepare_base_model(settings: Settings) -> None:
    from lora_assets.definitions import build_base_model

    def report(event: ProgressEvent) -> None:
        out.print(f"  {event}", markup=False)

    out.print(f"\n[bold]Base model[/bold]: {settings.base_model_name or 'the embedded one, made once'}")
    base = build_base_model(settings).process_config_and_initialize().resolve(report)
    out.print(f"  {base.name} in {base.path}")


def _play(settings: Settings, files: Sequence[ExportFile]) -> list[DateOutcome]:
    """Let each date's files arrive, then make what is missing or stale, and the newest date in any case."""
    from lora_assets.cli.run import find_states
    from lora_assets.freshness import choose_dates
    from lora_assets.runner import run_date

    outcomes = []
    dates = sorted({file.date for file in files})
    for date in dates:
        arrived = [_arrive(file, settings.exports) for file in files if file.date == date]
        if date not in choose_dates(find_states(settings), every=True) and date != dates[-1]:
            out.print(f"\n[bold]{date}[/bold]: unchanged since the last run, reused")
            continue
        out.print(f"\n[bold]{date}[/bold]: {', '.join(arrived)}")
        outcomes.append(run_date(settings, date))
        if outcomes[-1].error:
            err.print(f"error: {date} failed: {outcomes[-1].error}", style="red", markup=False)
    return outcomes


def _arrive(file: ExportFile, directory: Path) -> str:
    """Copy an export as the loop would write it: beside, then renamed, with its own time."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / file.name
    if not target.exists() or target.read_bytes() != file.path.read_bytes():
        temporary = temporary_sibling(target)
        shutil.copy2(file.path, temporary)
        temporary.replace(target)
    return file.name


def _conclude(settings: Settings, outcomes: Sequence[DateOutcome]) -> None:
    from lora_assets.cli.summary import print_outcome

    newest = outcomes[-1]
    print_outcome(newest)
    if newest.status == "SUCCESS":
        _print_history(settings)
        _print_answers(settings, newest.date)
    root = os.path.relpath(settings.data_root)
    out.print(
        f"\nOpen the UI with [bold]DATA_ROOT={root} make dev[/bold] and look at http://localhost:3000/asset-groups"
    )


def _print_history(settings: Settings) -> None:
    from finetune.registry.store import list_versions

    print_table(
        "\nVersions in the registry (held-out loss and answers, before -> after)",
        ["version", "date", "loss", "right answers", "verdict"],
        [
            [
                version.version,
                str(version.lineage["date"]),
                f"{version.metrics['base_loss']:.2f} -> {version.metrics['eval_loss']:.2f}",
                f"{version.metrics['base_exact_match']:.0%} -> {version.metrics['exact_match']:.0%}",
                f"{version.status}: {version.reason.split(': loss')[0]}",
            ]
            for version in list_versions(settings.layout.registry)
        ],
    )


def _print_answers(settings: Settings, date: str) -> None:
    """Ask the base's GGUF and the exported one questions whose wording training never saw."""
    from finetune.evaluation.models import EvalReport
    from finetune.export.models import GgufExport
    from finetune.export.runtime import GgufRuntime
    from lora_assets.freshness import read_value

    export = read_value(settings, "gguf", date, GgufExport)
    report = read_value(settings, "eval_report", date, EvalReport)
    if export is None or report is None:
        return
    # Each language gets its turn: those with Latin letters first.
    answers = sorted(report.answers, key=lambda answer: not answer.reference.isascii())
    rows = [[answer.prompt, answer.reference] for answer in (answers[:1] + answers[-QUESTIONS + 1 :])]
    for file in (export.base, export.quantized):
        with GgufRuntime(file.path) as runtime:
            for row in rows:
                row.append(runtime.chat([{"role": "user", "content": row[0]}], max_tokens=64).strip())
    print_table(
        f"\nAnswers of {export.base.path.name} and of {export.quantized.path.name}, by llama.cpp, "
        "to held-out questions",
        ["question", "expected", "base model", "exported model"],
        rows,
    )
    out.print(f"Talk to it: lora-assets serve --gguf {export.quantized.path}", markup=False)


@plain_errors
def dev(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the UI.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    as_json: Json = False,
) -> None:
    """Open the Dagster UI and daemon on this machine, on the data root's own history."""
    import dagster as dg

    from lora_assets.run_queue import limit_gpu_pool
    from lora_assets.runner import dagster_home
    from lora_assets.settings import load_settings

    settings = load_settings()
    home = dagster_home(settings)
    settings.exports.mkdir(parents=True, exist_ok=True)
    with dg.DagsterInstance.get() as instance:
        limit_gpu_pool(instance, settings.gpus)
    if as_json:
        print_json({"url": f"http://{host}:{port}", "dagster_home": str(home), "exports": str(settings.exports)})
    else:
        out.print(f"UI: http://{host}:{port}  history: {home}  watched: {settings.exports}/{settings.pattern}")
        switch = "switch export_arrival on under Automation (or set AUTOMATION_ON), then "
        first = "" if settings.automation_on else switch
        out.print(f"To see it work: {first}drop an export into the watched directory.")
    program = str(Path(sys.executable).with_name("dagster"))
    os.execv(program, [program, "dev", "-m", "lora_assets.definitions", "-h", host, "-p", str(port)])
