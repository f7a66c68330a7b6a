"""`lora-assets run`: the entry point of a Job or CronJob."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from finetune.dataset.discovery import discover_exports
from finetune.errors import ConfigurationError, DatasetError
from lora_assets.cli.console import EXIT_TRANSIENT, Json, err, out, plain_errors, print_json, print_table
from lora_assets.freshness import DateState, choose_dates, date_states
from lora_assets.settings import Settings, load_settings


@plain_errors
def run(
    date: Annotated[str | None, typer.Option(help="Only this dataset date (YYYY-MM-DD), even if current.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every date that is missing or stale.")] = False,
    latest: Annotated[bool, typer.Option("--latest", help="Only the newest date, if it is missing or stale.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Make what is missing or stale, oldest date first.

    Without options: each date that was never made, and the newest of those whose inputs or settings changed
    (all of them with RETRAIN=all). Exits with 0 if every run succeeded (a challenger that loses is a success),
    with 75 if trying again later may help, else with 1.
    """
    if sum([date is not None, every, latest]) > 1:
        raise ConfigurationError("--date, --all and --latest exclude each other", remedy="Give one of them")
    settings = load_settings()
    states = find_states(settings)
    if date is None:
        dates = choose_dates(states, every=every or settings.retrain == "all", latest=latest)
    elif date in {state.date for state in states}:
        dates = [date]
    else:
        known = ", ".join(state.date for state in states[-5:])
        raise DatasetError(f"no exports of {date}", where=settings.exports, remedy=f"The newest dates are {known}")
    if not as_json:
        print_states(states, dates)
    if not dry_run:
        make_dates(settings, dates, as_json=as_json)
    elif as_json:
        print_json({"status": "dry_run", "dates": [state.model_dump() for state in states], "to_make": dates})


def find_states(settings: Settings) -> list[DateState]:
    """The state of every date that has exports.

    Raises:
        DatasetError: the directory cannot be read, or holds no export.
    """
    files = discover_exports(settings.exports, settings.pattern)
    if not files:
        raise DatasetError(
            f"no exports: no file is named {settings.pattern}",
            where=settings.exports,
            remedy="Put exports there, or set EXPORTS_DIR or EXPORTS_PATTERN",
        )
    return date_states(settings, files)


def print_states(states: Sequence[DateState], dates: Sequence[str]) -> None:
    """What lies there, and what will be made."""
    print_table(
        None,
        ["date", "files", "MB", "state", "why", ""],
        [
            [s.date, str(s.files), f"{s.size / 1e6:.2f}", s.state, s.reason, "make" if s.date in dates else ""]
            for s in states
        ],
    )


def make_dates(settings: Settings, dates: Sequence[str], *, as_json: bool) -> None:
    """Run the graph for each date and print how it ended; a failed date does not keep the others from running.

    Raises:
        typer.Exit: with code 1 if a run failed, 75 if trying again later may help.
    """
    from lora_assets.cli.summary import print_outcome
    from lora_assets.runner import run_date

    outcomes = []
    for date in dates:
        if not as_json:
            out.print(f"\n[bold]{date}[/bold]")
        outcomes.append(run_date(settings, date))
        if not as_json:
            print_outcome(outcomes[-1])
    failed = [outcome for outcome in outcomes if outcome.status == "FAILURE"]
    if as_json:
        print_json({"status": "failed" if failed else "completed", "runs": [o.model_dump() for o in outcomes]})
    elif not dates:
        out.print("nothing to do: every date is current")
    for outcome in failed:
        err.print(f"error: {outcome.date} failed: {outcome.error}", style="red", markup=False)
    if failed:
        raise typer.Exit(EXIT_TRANSIENT if all(outcome.transient for outcome in failed) else 1)
