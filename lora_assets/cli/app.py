"""`lora-assets`: the Job/CronJob entry point, the demo, and tools."""

from __future__ import annotations

import logging
import os
import warnings

import typer
from dagster_shared.utils.warnings import BetaWarning, PreviewWarning

from lora_assets.cli import (
    ablation,
    continual,
    curriculum,
    deletions,
    demo,
    drift,
    ensemble,
    experiment,
    gc,
    migrate,
    plan,
    push,
    registry,
    reproduce,
    run,
    samples,
    serve,
    show,
    tools,
    trace,
    trainjob,
)
from lora_assets.cli.log_lines import set_up_logs

app = typer.Typer(
    name="lora-assets",
    help="Turns a directory of JSONL exports into a fine-tuned, evaluated, versioned and servable model.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command(epilog="Example: lora-assets run --latest --dry-run")(run.run)
app.command(epilog="Example: lora-assets backfill --from 2026-06-01 --to 2026-06-30 --dry-run")(run.backfill)
app.command(epilog="Example: lora-assets drift --json")(drift.drift)
app.command(epilog="Example: lora-assets demo")(demo.demo)
app.command(epilog="Example: DATA_ROOT=data/demo lora-assets dev --port 3000")(demo.dev)
app.command(epilog="Example: lora-assets config --json")(show.config)
app.command(epilog="Example: lora-assets runs --limit 5 --json")(show.runs)
app.command(epilog="Example: lora-assets migrate")(migrate.migrate)
tools.dataset_app.command(epilog="Example: lora-assets dataset deletions --list deletions.txt")(deletions.deletions)
app.add_typer(tools.dataset_app, name="dataset")
app.add_typer(registry.app, name="registry")
app.command(epilog="Example: lora-assets gc --dry-run")(gc.gc)
experiment.app.command("ablation", epilog="Example: lora-assets experiment ablation ablation.yaml --dry-run")(
    ablation.ablation
)
experiment.app.command(epilog="Example: lora-assets experiment continual continual.yaml --dry-run")(continual.continual)
experiment.app.command(epilog="Example: lora-assets experiment curriculum curriculum.yaml --dry-run")(
    curriculum.curriculum
)
experiment.app.command(epilog="Example: lora-assets experiment ensemble ensemble.yaml --dry-run")(ensemble.ensemble)
app.add_typer(experiment.app, name="experiment")
app.command(epilog="Example: lora-assets reproduce data/registry/brain/v3 --check-only")(reproduce.reproduce)
app.command(epilog="Example: lora-assets trace data/registry/brain/v3 eval_loss")(trace.trace)
app.command("export-samples", epilog="Example: lora-assets export-samples --since 2026-06-01 --until 2026-06-02")(
    samples.export_samples
)
app.command(epilog="Example: lora-assets plan --base-model llama3-8b --vram-limit-gb 24")(plan.plan)
app.command(epilog="Example: lora-assets train --base-model llama3-8b --dataset train.jsonl --output a")(tools.train)
app.command(epilog="Example: lora-assets evaluate --adapter A --dataset eval.jsonl --output report")(tools.evaluate)
app.command(epilog="Example: lora-assets merge --base-model llama3-8b --adapter A --output merged")(tools.merge)
app.command(
    epilog="Example: lora-assets trainjob --name brain --image ghcr.io/acme/lora-assets-train:0.1.0 --nodes 2 --gpus 8 "
    "--base-model llama3-8b --dataset /data/train.jsonl --output /data/a | kubectl apply -f -"
)(trainjob.trainjob)

app.command(epilog="Example: lora-assets serve --gguf merged-Q4_K_M.gguf --port 8080")(serve.serve)
app.command(epilog="Example: lora-assets push v3 --repo acme/brain")(push.push)


def main() -> None:
    """The console script."""
    from dotenv import load_dotenv

    # Threads of PyTorch that wait by spinning starve each other on a busy machine: five times slower was seen.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Nothing here multiplies matrices by numpy, whose BLAS threads spin from the moment that it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Progress is told by our own lines; libraries' bars and talk of their next releases only hide it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=PreviewWarning)
    warnings.filterwarnings("ignore", category=BetaWarning)
    # Secrets reach Dagster's resources by the name of their variable, so `.env` must be in the environment.
    load_dotenv(".env")
    set_up_logs()
    app()
