"""The single steps of the loop on the command line, without Dagster."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel

from finetune.base_model.models import BaseModelRef
from finetune.base_model.resolve import resolve_base_model
from finetune.dataset.discovery import discover_exports
from finetune.errors import ConfigurationError
from finetune.planning.models import TrainableMethod
from finetune.progress import Progress, ProgressEvent, ignore_progress
from lora_assets.cli.console import Json, err, iso_date, plain_errors, print_json, print_table, read_model
from lora_assets.settings import Quantization, load_settings

BaseModelOption = Annotated[
    str | None, typer.Option("--base-model", help="Directory, hub name or short name; default: BASE_MODEL_NAME.")
]
AdapterOption = Annotated[Path, typer.Option("--adapter", help="Adapter directory in PEFT's layout.")]
AttentionOption = Annotated[
    Literal["sdpa", "eager", "flash", "flash_attention_2"] | None,
    typer.Option(help="Attention implementation; flash is flash_attention_2."),
]
OutputOption = Annotated[Path, typer.Option("--output", help="Directory that is made, whole or not at all.")]

dataset_app = typer.Typer(help="Prepare and profile datasets.", no_args_is_help=True)


@dataset_app.command("prepare", epilog="Example: lora-assets dataset prepare examples/exports /tmp/root --json")
@plain_errors
def prepare(
    source: Annotated[Path, typer.Argument(help="Directory of exports.")],
    output: Annotated[Path, typer.Argument(help="Data root under which the dataset is published.")],
    date: Annotated[str | None, typer.Option(help="Dataset date; default: the newest.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that validate.")] = 1,
    as_json: Json = False,
) -> None:
    """Validate, deduplicate and split the exports of a directory."""
    from finetune.dataset.prepare import prepare_dataset
    from finetune.errors import DatasetError
    from finetune.layout import DataLayout

    settings = load_settings()
    files = discover_exports(source, settings.pattern)
    if not files:
        raise DatasetError(f"no file is named {settings.pattern}", where=source, remedy="Set EXPORTS_PATTERN")
    prepared = prepare_dataset(
        files,
        date=iso_date("--date", date) if date else files[-1].date,
        layout=DataLayout(output.absolute(), settings.pipeline_name),
        parameters=settings.prepare_parameters,
        workers=workers,
        on_progress=progress(as_json),
    )
    show(prepared, as_json)


@dataset_app.command("analyze", epilog="Example: lora-assets dataset analyze examples/exports --json")
@plain_errors
def analyze(
    path: Annotated[Path, typer.Argument(help="JSONL, CSV, Parquet, a saved datasets directory, or a directory.")],
    source_format: Annotated[
        Literal["auto", "jsonl", "csv", "parquet", "hf"], typer.Option("--format", help="What the path holds.")
    ] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="Model whose tokenizer counts; without it nothing is said of tokens.")
    ] = None,
    sample_size: Annotated[
        int, typer.Option(min=1, help="Records on which a faster tokenizer must prove equal before it counts.")
    ] = 1000,
    as_json: Json = False,
) -> None:
    """Profile any dataset: counts, columns, exact token statistics."""
    from finetune.chat.encode import RecordEncoder
    from finetune.dataset.profile import analyze as analyze_path

    encoder = None if tokenizer is None else RecordEncoder.load(find_base(tokenizer, weights=False).path)
    show(
        analyze_path(
            path,
            format=source_format,
            encoder=encoder,
            tokenizer=tokenizer,
            sample_size=sample_size,
            on_progress=progress(as_json),
        ),
        as_json,
    )


@plain_errors
def train(
    dataset: Annotated[Path, typer.Option("--dataset", help="Records to train on, as JSONL.")],
    output: OutputOption,
    base_model: BaseModelOption = None,
    plan: Annotated[Path | None, typer.Option(help="JSON of `plan --json`; without it, one is made.")] = None,
    method: Annotated[
        TrainableMethod | None, typer.Option(help="How to train, where a plan is made; default: TRAINING_METHOD.")
    ] = None,
    attention: AttentionOption = None,
    dora: Annotated[bool, typer.Option("--dora", help="Weight-decomposed LoRA, where a plan is made.")] = False,
    rslora: Annotated[bool, typer.Option("--rslora", help="Rank-stabilized LoRA, where a plan is made.")] = False,
    pissa: Annotated[
        bool, typer.Option("--pissa", help="Start from principal singular vectors, where a plan is made.")
    ] = False,
    resume_from: Annotated[
        Path | None, typer.Option(help="Checkpoint of the same training elsewhere; its own are found without.")
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Adapter whose weights the training begins with; of the plan's kind and size.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Everything up to loading the model.")] = False,
    nodes: Annotated[int, typer.Option(min=1, envvar="PET_NNODES", help="Machines that train together.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, envvar="PET_NODE_RANK", help="This machine's number.")] = 0,
    master_addr: Annotated[
        str, typer.Option(envvar="PET_MASTER_ADDR", help="Address of the machine with number 0.")
    ] = "localhost",
    master_port: Annotated[int, typer.Option(envvar="PET_MASTER_PORT", help="A free port of that machine.")] = 29500,
    as_json: Json = False,
) -> None:
    """Train an adapter on a file of records; killed and run again, it goes on from its last checkpoint.

    Several machines that see the same files train together when each runs the same command with its own number.
    """
    from finetune.chat.encode import RecordEncoder
    from finetune.dataset.profile import analyze as analyze_path
    from finetune.planning.cost import refuse_above
    from finetune.planning.models import TrainingPlan
    from finetune.planning.overrides import PlanOverrides
    from finetune.planning.plan import make_plan
    from finetune.training.init_adapter import plan_like, read_init_adapter
    from finetune.training.models import Nodes
    from finetune.training.ownership import hold_output
    from finetune.training.request import request_for_file
    from finetune.training.sft import dry_run as try_out
    from finetune.training.sft import train_adapter
    from lora_assets.cli.plan import history, print_plan

    if node_rank >= nodes:
        raise ConfigurationError(
            f"{node_rank} is no number of {nodes} machines", where="--node-rank", remedy=f"Use 0 to {nodes - 1}"
        )
    settings = load_settings()
    base = find_base(base_model)
    if plan is not None:
        chosen = read_model(plan, TrainingPlan)
    else:
        # What nobody names is as in the adapter to start from.
        like_method, like = plan_like(init_from) if init_from else (None, PlanOverrides())
        given = PlanOverrides(
            lora_rank=settings.lora_rank,
            epochs=settings.train_epochs,
            learning_rate=settings.learning_rate,
            max_length=settings.max_length,
            micro_batch=settings.micro_batch,
            accumulation=settings.accumulation,
            attention=attention,
            use_dora=dora or None,
            use_rslora=rslora or None,
            use_pissa=pissa or None,
            seed=settings.seed,
        )
        chosen = make_plan(
            base.path,
            analyze_path(dataset, format="jsonl", encoder=RecordEncoder.load(base.path)),
            task=settings.training_task,
            method=method or settings.training_method or like_method,
            overrides=like.model_copy(update=given.model_dump(exclude_none=True)),
            vram_limit_gb=settings.vram_limit_gb,
            device=settings.device,
            history=history(settings, base.name, settings.device),
            stated_tokens_per_second=settings.tokens_per_second,
            price_per_gpu_hour=settings.gpu_hour_price,
        )
    refuse_above(chosen, settings.max_gpu_hours)
    init = read_init_adapter(init_from.absolute()) if init_from else None
    if dry_run:
        # What a training keeps beside its output is not for a dry run.
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / "adapter"
            result = try_out(request_for_file(dataset, plan=chosen, base_model=base, output=place, init_adapter=init))
        if not as_json:
            print_plan(chosen)
            result = result.model_copy(update={"plan": None})
    else:
        request = request_for_file(
            dataset,
            plan=chosen,
            base_model=base,
            output=output.absolute(),
            resume_from=resume_from.absolute() if resume_from else None,
            report_to=settings.report_to,
            processes=settings.train_processes,
            sharding=settings.train_sharding,
            nodes=Nodes(count=nodes, rank=node_rank, master_addr=master_addr, master_port=master_port)
            if nodes > 1
            else None,
            init_adapter=init,
        )
        # Of several machines the first holds it for all.
        with hold_output(request.adapter_dir) if node_rank == 0 else nullcontext():
            result = train_adapter(request, on_progress=progress(as_json))
    show(result, as_json)


@plain_errors
def evaluate(
    adapter: AdapterOption,
    dataset: Annotated[Path, typer.Option("--dataset", help="Held-out records as JSONL.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Directory that is made; default: evaluation-ADAPTER here.")
    ] = None,
    base_model: BaseModelOption = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens per record, as in training.")] = 1024,
    regressions: Annotated[
        Path | None, typer.Option(help="Directory of prompts with expectations; default: REGRESSIONS_DIR.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, comma-separated; default: EVAL_TASKS.")] = None,
    as_json: Json = False,
) -> None:
    """Compare an adapter with its base model on held-out records."""
    from finetune.evaluation.evaluate import evaluate_adapter
    from finetune.evaluation.tasks import EvalTasks

    settings = load_settings()
    adapter = adapter.absolute()
    names = settings.tasks if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]

    report = evaluate_adapter(
        base_model=find_base(base_model),
        adapter_path=adapter,
        dataset=dataset,
        output_dir=(output or Path(f"evaluation-{adapter.name}")).absolute(),
        run_id=adapter.name,
        regressions=regressions or settings.regressions,
        tasks=EvalTasks(names, settings.eval_tasks_dir),
        max_length=max_length,
        on_progress=progress(as_json),
    )
    show(report, as_json)


@plain_errors
def merge(
    adapter: AdapterOption,
    output: OutputOption,
    base_model: BaseModelOption = None,
    output_format: Annotated[
        Literal["safetensors", "pytorch", "gguf"], typer.Option("--format", help="Files of the merged model.")
    ] = "safetensors",
    quantization: Annotated[
        Quantization | None, typer.Option(help="Type of the GGUF; default: GGUF_QUANTIZATION. For --format gguf.")
    ] = None,
    validate: Annotated[
        bool,
        typer.Option("--validate/--no-validate", help="Compare with base + adapter, and a GGUF's answers, on prompts."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model."""
    from finetune.export.merge import merge_adapter
    from finetune.export.merge_gguf import merge_to_gguf

    if quantization is not None and output_format != "gguf":
        raise ConfigurationError("--quantization is for --format gguf", remedy="Add --format gguf, or leave it out")
    merged: BaseModel
    if output_format == "gguf":
        merged = merge_to_gguf(
            base_model=find_base(base_model),
            adapter_path=adapter,
            output_dir=output.absolute(),
            run_id=adapter.absolute().name,
            quantization=quantization or load_settings().gguf_quantization,
            validate_on=[[{"role": "user", "content": text}] for text in VALIDATION_TEXTS] if validate else None,
            on_progress=progress(as_json),
        )
    else:
        merged = merge_adapter(
            base_model=find_base(base_model),
            adapter_path=adapter,
            output_dir=output.absolute(),
            run_id=adapter.absolute().name,
            output_format=output_format,
            validate_on=VALIDATION_TEXTS if validate else None,
            on_progress=progress(as_json),
        )
    show(merged, as_json)


# Any text will do to compare two models that must be equal.
VALIDATION_TEXTS = ["The quick brown fox jumps over", "Як працює градієнтний спуск?", "def main(): return 1 +"]


def find_base(name: str | None, *, weights: bool = True) -> BaseModelRef:
    """The base model of that name, or of the environment's."""
    settings = load_settings()
    return resolve_base_model(
        name or settings.base_model_name,
        cache_dir=settings.layout.base_models,
        revision=settings.base_model_revision,
        token=settings.hf_token.get_secret_value() if settings.hf_token else None,
        trust_remote_code=settings.trust_remote_code,
        weights=weights,
        on_progress=progress(quiet=False),
    )


def progress(quiet: bool) -> Progress:
    """A listener that writes to standard error, or to nowhere."""

    def report(event: ProgressEvent) -> None:
        err.print(str(event), markup=False)

    return ignore_progress if quiet else report


def show(result: BaseModel, as_json: bool) -> None:
    """A result as JSON, or as a table of its simple values."""
    values = result.model_dump(mode="json")
    if as_json:
        print_json(values)
        return
    rows = [[name, _text(value)] for name, value in values.items() if value not in (None, [], {})]
    print_table(None, ["", ""], rows)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_text(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "\n".join(_text(each) for each in value[:20])
    return f"{value:.4g}" if isinstance(value, float) else str(value)
