"""`lora-assets run` and `backfill`: the entry points of a Job or CronJob."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from finetune.dataset.discovery import ExportFile, discover_exports
from finetune.errors import ConfigurationError, DatasetError, FinetuneError
from lora_assets.catch_up import CatchUp, catch_up
from lora_assets.cli.console import EXIT_TRANSIENT, Json, P, err, iso_date, out, plain_errors, print_json, print_table
from lora_assets.freshness import DateState, date_states
from lora_assets.settings import Settings, load_settings


def _told(command: Callable[P, None]) -> Callable[P, None]:
    """Send an alert where a command fails before it has run anything, unless it was to run nothing."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FinetuneError as error:
            if not kwargs.get("dry_run"):
                from lora_assets.run_end import tell_not_begun

                tell_not_begun(error)
            raise

    return wrapped


@plain_errors
@_told
def run(
    date: Annotated[str | None, typer.Option(help="Only this dataset date (YYYY-MM-DD), even if current.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every date that is missing or stale.")] = False,
    latest: Annotated[bool, typer.Option("--latest", help="Only the newest date, if it is missing or stale.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Make what is missing or stale, newest date first, as the nightly catch-up does.

    Without options: each date that was never made, and the newest of those whose inputs or settings changed
    (all of them with RETRAIN=all), as far as CATCH_UP_GPU_HOURS allows. Exits with 0 if every run succeeded
    (a challenger that loses is a success), with 75 if trying again later may help, else with 1.
    """
    if sum([date is not None, every, latest]) > 1:
        raise ConfigurationError("--date, --all and --latest exclude each other", remedy="Give one of them")
    settings = load_settings()
    files = find_exports(settings)
    states = date_states(settings, files)
    if date is None:
        from lora_assets.attempts import given_up_here

        given_up = {} if every else given_up_here(settings, files)
        chosen = catch_up(settings, files, states, every=every, latest=latest, given_up=given_up)
    elif date in {state.date for state in states}:
        chosen = CatchUp([date])
    else:
        known = ", ".join(state.date for state in states[-5:])
        raise DatasetError(f"no exports of {date}", where=settings.exports, remedy=f"The newest dates are {known}")
    show_or_make(settings, states, chosen, dry_run=dry_run, as_json=as_json)


@plain_errors
@_told
def backfill(
    since: Annotated[str, typer.Option("--from", help="First dataset date (YYYY-MM-DD).")],
    until: Annotated[str, typer.Option("--to", help="Last dataset date, itself included.")],
    force: Annotated[bool, typer.Option("--force", help="Make dates that are current, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Make what is missing or stale in a range of dates, oldest date first.

    A range that was interrupted goes on where it stood when the command is given again: dates that are current
    are passed over. Exits as `run` does.
    """
    first, last = iso_date("--from", since), iso_date("--to", until)
    if first > last:
        raise ConfigurationError(f"--from {first} is after --to {last}", remedy="Exchange them")
    settings = load_settings()
    states = [state for state in date_states(settings, find_exports(settings)) if first <= state.date <= last]
    if not states:
        raise DatasetError(f"no exports from {first} to {last}", where=settings.exports, remedy="Widen the range")
    chosen = CatchUp([state.date for state in states if force or state.state != "current"])
    show_or_make(settings, states, chosen, dry_run=dry_run, as_json=as_json)


def find_exports(settings: Settings) -> list[ExportFile]:
    """All exports.

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
    return files


def find_states(settings: Settings) -> list[DateState]:
    """The state of every date that has exports.

    Raises:
        DatasetError: the directory cannot be read, or holds no export.
    """
    return date_states(settings, find_exports(settings))


def show_or_make(
    settings: Settings, states: Sequence[DateState], chosen: CatchUp, *, dry_run: bool, as_json: bool
) -> None:
    """Print what lies there and what is chosen, and make it unless this is a dry run."""
    if not as_json:
        print_states(states, chosen)
    if not dry_run:
        make_dates(settings, chosen, as_json=as_json)
    elif as_json:
        shown = [state.model_dump() for state in states]
        print_json({"status": "dry_run", "dates": shown, "to_make": chosen.dates, "left": chosen.left})


def print_states(states: Sequence[DateState], chosen: CatchUp) -> None:
    """What lies there, and what will be made."""

    def note(date: str) -> str:
        return f"later: {chosen.left[date]}" if date in chosen.left else "make" if date in chosen.dates else ""

    print_table(
        None,
        ["date", "files", "MB", "state", "why", ""],
        [[s.date, str(s.files), f"{s.size / 1e6:.2f}", s.state, s.reason, note(s.date)] for s in states],
    )


def make_dates(settings: Settings, chosen: CatchUp, *, as_json: bool) -> None:
    """Run the graph for each date and print how it ended; a failed date does not keep the others from running.

    Raises:
        typer.Exit: with code 1 if a run failed, 75 if trying again later may help.
    """
    from lora_assets.cli.summary import print_outcome
    from lora_assets.runner import run_date

    outcomes = []
    for date in chosen.dates:
        if not as_json:
            out.print(f"\n[bold]{date}[/bold]")
        outcomes.append(run_date(settings, date))
        if not as_json:
            print_outcome(outcomes[-1])
    failed = [outcome for outcome in outcomes if outcome.status == "FAILURE"]
    if as_json:
        runs = [outcome.model_dump() for outcome in outcomes]
        print_json({"status": "failed" if failed else "completed", "runs": runs, "left": chosen.left})
    elif not chosen.dates:
        out.print("nothing to do now" if chosen.left else "nothing to do: every date is current")
    for outcome in failed:
        err.print(f"error: {outcome.date} failed: {outcome.error}", style="red", markup=False)
    if failed:
        raise typer.Exit(EXIT_TRANSIENT if all(outcome.transient for outcome in failed) else 1)
