"""`lora-assets experiment`: the search for the best adapter that a budget buys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError

from finetune.errors import ConfigurationError
from finetune.planning.models import Range
from finetune.search.models import Strategy, TrialRecord
from lora_assets.cli.console import Json, out, plain_errors, print_json, print_table

app = typer.Typer(help="Search for the best adapter that a budget buys.", no_args_is_help=True)


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
