"""`lora-assets plan`, and what its plans have in common with those of `lora-assets train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune.dataset.models import DatasetProfile
from finetune.errors import FinetuneError
from finetune.planning.history import Measurement
from finetune.planning.models import CostEstimate, Method, Optimizer, Task, TrainingPlan
from finetune.planning.rules import Device
from lora_assets.cli.console import Json, err, plain_errors, print_json, print_table, read_model
from lora_assets.cli.tools import AttentionOption, BaseModelOption, find_base
from lora_assets.settings import Settings, load_settings

# What a plan without a dataset is made for: a thousand records of a paragraph each.
ASSUMED_PROFILE = DatasetProfile(
    total_samples=1000,
    format_detected="assumed",
    has_instruction=True,
    has_output=True,
    avg_tokens=300,
    max_tokens=1000,
    columns=[],
    duplicates_found=0,
    total_tokens=300_000,
)
_ASSUMED = "no --dataset-profile: a thousand records of 300 tokens are assumed"


@plain_errors
def plan(
    base_model: BaseModelOption = None,
    method: Annotated[
        Method | None, typer.Option(help="How to train; default: lora, or qlora where lora does not fit.")
    ] = None,
    task: Annotated[Task | None, typer.Option(help="What the adapter is for; default: TRAINING_TASK.")] = None,
    vram_limit_gb: Annotated[
        float | None, typer.Option(help="Memory of the GPU in GB, for which is planned then; default: VRAM_LIMIT_GB.")
    ] = None,
    dataset_profile: Annotated[
        Path | None, typer.Option(help="JSON of `dataset analyze --json`; without it, a made-up small dataset.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter.")] = None,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="Names, comma-separated or one a flag; or all-linear.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens per record.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Records per forward pass.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute activations again instead of keeping them.",
        ),
    ] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Several records in one row, apart from each other.")
    ] = None,
    attention: AttentionOption = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="The optimizer.")] = None,
    as_json: Json = False,
) -> None:
    """Plan a training: configuration, search space, memory, time and price, each choice with its reason.

    A value given is kept, the rest is chosen. The base model may be a directory that holds a config.json alone.
    """
    from finetune.planning.overrides import PlanOverrides
    from finetune.planning.plan import make_plan

    settings = load_settings()
    local = base_model is not None and Path(base_model).is_dir()
    base = None if local else find_base(base_model, weights=False)
    overrides = PlanOverrides(
        lora_rank=rank,
        target_modules=_modules(target_modules),
        max_length=max_length,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        packing=packing,
        attention=attention,
        optimizer=optimizer,
    )
    # Whoever names a GPU's memory plans for a GPU, wherever the plan is made.
    for_gpu = vram_limit_gb is not None and settings.train_device == "auto"
    device: Device = "cuda" if for_gpu else settings.device
    result = make_plan(
        base.path if base else Path(base_model or ""),
        read_model(dataset_profile, DatasetProfile) if dataset_profile else ASSUMED_PROFILE,
        task=task or settings.training_task,
        method=method,
        overrides=overrides,
        vram_limit_gb=vram_limit_gb or settings.vram_limit_gb,
        device=device,
        history=history(settings, base.name if base else str(base_model), device),
        stated_tokens_per_second=settings.tokens_per_second,
        price_per_gpu_hour=settings.gpu_hour_price,
    )
    if dataset_profile is None:
        result = result.model_copy(update={"explanations": [_ASSUMED, *result.explanations]})
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print_plan(result)


def print_plan(plan: TrainingPlan) -> None:
    """A plan as tables for people."""
    print_table("configuration", ["choice", "why"], [line.split(": ", 1) for line in plan.explanations])
    memory, cost = plan.memory_estimate, plan.cost
    fits = {True: f", fits {memory.limit_gb} GB", False: f", does not fit {memory.limit_gb} GB", None: ""}[memory.fits]
    parts = [[name, f"{value:.3f}"] for name, value in memory.parts.items()]
    print_table(f"memory{fits}", ["part", "GB"], [*parts, ["together", f"{memory.vram_gb:.3f}"]])
    print_table("search space", ["parameter", "range"], [[name, str(span)] for name, span in plan.search_space.items()])
    figures = [
        ["trial_id", plan.trial_config.trial_id],
        ["parameters", f"{memory.model_params:,}, trained {memory.trainable_params:,}"],
        ["steps", f"{plan.estimated_steps:,} of {plan.trial_config.effective_batch} records"],
        ["tokens", "unknown" if plan.estimated_tokens is None else f"{plan.estimated_tokens:,}"],
    ]
    if cost is not None:
        figures += [
            ["GPU-hours", "unknown" if cost.gpu_hours is None else f"{cost.gpu_hours:.3g} ({_speed(cost)})"],
            ["price", "unknown" if cost.price is None else f"{cost.price:.2f}"],
        ]
    print_table("time and price", ["", ""], figures)


def _speed(cost: CostEstimate) -> str:
    return f"{cost.tokens_per_second:.0f} tokens per second, {cost.throughput}"


def history(settings: Settings, base_model: str, device: Device) -> list[Measurement]:
    """What earlier trainings took, where there is a run log already; a plan needs none."""
    if not settings.database_url and not settings.layout.postgres.exists():
        return []
    from lora_assets.definitions import open_run_log

    try:
        with open_run_log(settings) as run_log:
            return run_log.measurements(base_model, device)
    except FinetuneError as error:
        err.print(f"estimates are not corrected by earlier trainings: {error}", markup=False)
        return []


def _modules(names: list[str] | None) -> list[str] | Literal["all-linear"] | None:
    if not names:
        return None
    modules = [name.strip() for given in names for name in given.split(",") if name.strip()]
    return "all-linear" if modules == ["all-linear"] else modules
