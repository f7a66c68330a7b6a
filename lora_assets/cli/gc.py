"""`lora-assets gc`: what nobody needs any more is removed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import TransientError
from finetune.garbage import find_garbage, remove_garbage
from lora_assets.cli.console import Json, out, plain_errors, print_json, print_table
from lora_assets.settings import Settings, load_settings

if TYPE_CHECKING:
    from resources.run_log import RunLog

# A lease that is asked for to remove something is not waited for.
_LEASE_SECONDS = 1.0
_MEANING = {
    "temporary": "left by killed writers",
    "checkpoints": "of trainings that are done",
    "work": "of trainings that nobody goes on with",
    "exports": "of versions that are not kept",
    "adapter": "of no version, or of a collected one",
    "index": "of exports that nobody prepares any more",
    "values": "between the steps of old runs",
}


@plain_errors
def gc(
    keep: Annotated[
        int | None, typer.Option(min=1, help="Versions, by number and by reign, whose exports stay; default: GC_KEEP.")
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=1, help="Age from which what nothing refers to goes; default: GC_DAYS.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what killed processes left, old work in progress, and exports and adapters that nothing refers to.

    Registered versions stay (`lora-assets registry gc` removes the weights of old challengers), and so does
    everything that somebody works on.
    """
    settings = load_settings()
    with _in_use(settings) as (run_log, live):
        busy = unfinished_runs(settings)
        found = find_garbage(
            settings.data_root,
            keep=keep or settings.gc_keep,
            days=days or settings.gc_days,
            live=frozenset(live),
            busy=busy > 0,
        )
        if not dry_run:

            @contextmanager
            def hold(run_id: str) -> Iterator[None]:
                if not busy and unfinished_runs(settings):
                    raise TransientError("a run has begun meanwhile", where=settings.data_root, remedy="Run again")
                if run_log is None:
                    yield
                else:
                    with run_log.lease(run_id, seconds=_LEASE_SECONDS):
                        yield

            found = remove_garbage(found, hold=hold)
    freed = sum(garbage.size for garbage in found)
    if as_json:
        rows = [{"rule": each.rule, "path": str(each.path), "freed": each.size} for each in found]
        print_json({"dry_run": dry_run, "freed": freed, "unfinished_runs": busy, "removed": rows})
        return
    sizes = defaultdict(list)
    for each in found:
        sizes[each.rule].append(each.size)
        out.print(f"{each.path}  {each.size / 1e6:.1f} MB", markup=False)
    if found:
        print_table(
            None,
            ["rule", "what", "number", "MB"],
            [[rule, _MEANING[rule], str(len(each)), f"{sum(each) / 1e6:.1f}"] for rule, each in sizes.items()],
        )
    if busy:
        out.print(f"exports and adapters were left alone: {busy} runs are unfinished")
    out.print(f"{'would remove' if dry_run else 'removed'} {len(found)} things: {freed / 1e6:.1f} MB")


@contextmanager
def _in_use(settings: Settings) -> Iterator[tuple[RunLog | None, set[str]]]:
    """The run log, and the trainings that somebody works on; neither where no run log was ever begun."""
    from lora_assets.definitions import open_run_log

    if settings.database_url is None and not settings.layout.postgres.exists():
        yield None, set()
        return
    with open_run_log(settings) as run_log:
        yield run_log, run_log.live_trainings()


def unfinished_runs(settings: Settings) -> int:
    """How many runs Dagster's history has that have begun and not ended."""
    import dagster as dg

    from lora_assets.runner import dagster_home

    if "DAGSTER_HOME" not in os.environ and not (settings.data_root / "dagster").exists():
        return 0
    dagster_home(settings)
    begun = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    with dg.DagsterInstance.get() as instance:
        return instance.get_runs_count(dg.RunsFilter(statuses=begun))
