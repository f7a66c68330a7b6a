"""What all commands share: output for people or machines, and errors without tracebacks."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from finetune.errors import FinetuneError, TransientError

P = ParamSpec("P")
R = TypeVar("R")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

# sysexits.h: trying again later may help.
EXIT_TRANSIENT = 75


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_table(title: str | None, columns: list[str], rows: list[list[str]]) -> None:
    """A table for people."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    # A log file is read in a window wider than the 80 columns that stand for "unknown".
    console.width = console.width if console.is_terminal else max(console.width, 120)
    console.print(table)


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """End a command with one clear line and exit code 1 (75 when trying again may help) for our own errors."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except FinetuneError as error:
            err.print(f"error: {error}", style="red", markup=False)
            raise typer.Exit(EXIT_TRANSIENT if isinstance(error, TransientError) else 1) from error

    return wrapped
