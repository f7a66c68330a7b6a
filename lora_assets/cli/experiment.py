"""`lora-assets experiment`: the search for the best adapter that a budget buys."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError

from finetune.errors import ConfigurationError, FinetuneError, TransientError
from finetune.planning.models import Range
from finetune.search.ledger import budget_of
from finetune.search.models import StepResult, Strategy, TrialRecord
from finetune.search.result import experiment_result, shown
from finetune.search.spec import ExperimentSpec, read_spec
from lora_assets.cli.console import Json, err, out, plain_errors, print_json, print_table
from lora_assets.cli.tools import progress
from lora_assets.settings import load_settings

if TYPE_CHECKING:
    from resources.experiment import Experiment

app = typer.Typer(help="Search for the best adapter that a budget buys.", no_args_is_help=True)


Name = Annotated[str, typer.Argument(help="As `run` printed it, and `show` lists it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Propose and price all trials; train nothing.")]


@app.command(epilog="Example: lora-assets experiment run examples/experiment.yaml --dry-run")
@plain_errors
def run(
    spec: Annotated[Path, typer.Argument(help="YAML file; docs/search.md has a table of its fields.")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run an experiment, or go on with it: what was tried is not tried again.

    Limits (trials, budget, threshold, patience) may be changed from run to run. Exits with 75 if trying again later
    may help.
    """
    chosen = read_spec(spec, ExperimentSpec)
    _run(chosen.model_copy(update={"dry_run": chosen.dry_run or dry_run}), as_json)


@app.command(epilog="Example: lora-assets experiment resume 1a2b3c4d5e6f")
@plain_errors
def resume(name: Name, as_json: Json = False) -> None:
    """Go on with an experiment as it was run last."""
    from lora_assets.experiments import open_study

    store = open_study(load_settings())
    try:
        spec = store.find_experiment(name).spec
    finally:
        store.close()
    _run(spec, as_json)


@app.command(epilog="Example: lora-assets experiment show 1a2b3c4d5e6f --json")
@plain_errors
def show(
    name: Annotated[str | None, typer.Argument(help="An experiment; without it, all of them are listed.")] = None,
    as_json: Json = False,
) -> None:
    """Show an experiment as it stands, also while it runs."""
    from lora_assets.experiments import open_study

    store = open_study(load_settings())
    try:
        if name is None:
            _list([store.find_experiment(each) for each in store.experiments()], as_json)
            return
        experiment = store.find_experiment(name)
        history = experiment.history()
        result = experiment_result(name, experiment.spec, history, ended=experiment.over())
    finally:
        store.close()
    _print(result, experiment.spec, history, as_json)


def _list(experiments: list[Experiment], as_json: bool) -> None:
    results = [
        (each.name, each.spec.goal, experiment_result(each.name, each.spec, each.history(), ended=each.over()))
        for each in experiments
    ]
    if as_json:
        print_json([{"name": name, "goal": goal, **result.metadata} for name, goal, result in results])
    elif not results:
        out.print("no experiment yet")
    else:
        rows = [
            [name, goal, str(r.metadata["total_trials"]), r.output_text.splitlines()[-1]] for name, goal, r in results
        ]
        print_table(None, ["name", "goal", "trials", "state"], rows)


def _run(spec: ExperimentSpec, as_json: bool) -> None:
    from lora_assets.experiments import conclude, open_experiment, open_study, run_worker
    from lora_assets.laboratory import make_bench

    settings = load_settings()
    report = progress(as_json)
    if spec.dry_run:
        _propose(spec, as_json)
        return
    bench = make_bench(settings, spec, report, weights=True)
    store = open_study(settings)
    try:
        opened = open_experiment(store, spec, bench, settings)
        err.print(f"experiment {opened.experiment.name}", markup=False)
        if spec.workers == 1:
            run_worker(opened, report)
        else:
            _run_workers(opened.experiment.name, spec.workers, as_json)
        result = conclude(opened, report)
        history = opened.experiment.history()
    finally:
        store.close()
    if not as_json:
        out.print(f"report: {settings.layout.experiment(opened.experiment.name) / 'report.html'}", markup=False)
    _print(result, spec, history, as_json)


def _run_workers(name: str, count: int, quiet: bool) -> None:
    """Run workers as processes of their own; where there are several GPUs, they are dealt out.

    Raises:
        TransientError: a worker ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work_alone, args=(name, index, quiet), daemon=True) for index in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [worker for worker in workers if worker.exitcode]
    if failed:
        raise TransientError(
            f"{len(failed)} of {count} workers ended without a result",
            where=f"experiment {name}",
            remedy=f"Their errors stand above; lora-assets experiment resume {name} goes on",
        )


def work_alone(name: str, index: int, quiet: bool) -> None:
    """One of several workers, in a process of its own."""
    from lora_assets.experiments import Opened, open_study, own_gpu, run_worker
    from lora_assets.laboratory import make_bench

    # A spawned process has none of what the command silenced.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    own_gpu(index)
    settings = load_settings()
    store = open_study(settings)
    try:
        experiment = store.find_experiment(name)
        report = progress(quiet)
        run_worker(Opened(experiment, make_bench(settings, experiment.spec, report, weights=True), settings), report)
    except FinetuneError as error:
        err.print(f"worker {index}: {error}", style="red", markup=False)
        sys.exit(1)
    finally:
        store.close()


def _propose(spec: ExperimentSpec, as_json: bool) -> None:
    from finetune.search.candidates import experiment_space
    from finetune.search.dry_run import dry_run
    from lora_assets.cli.plan import history
    from lora_assets.laboratory import make_bench

    settings = load_settings()
    bench = make_bench(settings, spec, progress(as_json))
    bench = bench.measured(history(settings, bench.base_model.name, bench.device))
    result = dry_run(spec, bench, experiment_space(spec, bench))
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    rows = [
        [str(row["number"]), str(row["steps"]), _figure(row["gpu_hours"]), _figure(row["price"]), str(row["params"])]
        for row in result.data["proposed"]
    ]
    print_table("proposed", ["trial", "steps", "GPU-hours", "price", "configuration"], rows)
    out.print(result.output_text, markup=False)


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _print(result: StepResult, spec: ExperimentSpec, history: list[TrialRecord], as_json: bool) -> None:
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    rows = [
        [
            str(trial.number),
            trial.state,
            "" if trial.value is None else f"{trial.value:.4f}",
            f"{3600 * trial.gpu_hours:.1f}",
            shown(trial),
            trial.reason or trial.run_id,
        ]
        for trial in history
    ]
    print_table(None, ["trial", "state", spec.stop_metric, "seconds", "configuration", "run, or why it ended"], rows)
    budget = budget_of(history, spec.budget_gpu_hours)
    out.print(f"{budget.used:.3g} of {budget.gpu_hours:g} GPU-hours used", markup=False)
    out.print(result.output_text.splitlines()[-1], markup=False)
    if adopted := result.metadata["adopt_trial"]:
        out.print(f"ADOPT_TRIAL={adopted}", markup=False)


class Question(BaseModel):
    """What a suggestion is made from; `trial_history` may be left out for the first."""

    search_space: dict[str, Range]
    trial_history: list[TrialRecord] = []


@app.command(epilog="Example: lora-assets experiment suggest question.json --strategy bandit --json")
@plain_errors
def suggest(
    question: Annotated[Path, typer.Argument(help="JSON object: search_space, and trial_history if there is any.")],
    strategy: Annotated[Strategy, typer.Option(help="How to choose.")] = "bayesian",
    budget_remaining: Annotated[float, typer.Option(help="GPU-hours that may still be taken.")] = 5.0,
    trials_remaining: Annotated[int, typer.Option(help="Trials that may still start.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 42,
    as_json: Json = False,
) -> None:
    """The next configuration to try, from what was tried; it needs no experiment, database or training."""
    from finetune.search.suggest import suggest as suggested

    try:
        asked = TypeAdapter(Question).validate_json(question.read_bytes())
    except ValidationError as error:
        raise ConfigurationError(f"no question: {error}", where=question, remedy="docs/search.md shows one") from error
    chosen = suggested(asked.trial_history, asked.search_space, strategy, budget_remaining, trials_remaining, seed=seed)
    if as_json:
        print_json(chosen)
    elif chosen is None:
        out.print("nothing more: budget or trials are spent")
    else:
        print_table(None, ["parameter", "value"], [[name, str(value)] for name, value in chosen.items()])
