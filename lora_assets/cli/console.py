"""What all commands share: output for people or machines, and errors without tracebacks."""

from __future__ import annotations

import datetime
import errno
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.errors import ConfigurationError, FinetuneError, TransientError

P = ParamSpec("P")
R = TypeVar("R")
Model = TypeVar("Model", bound=BaseModel)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

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
        # As text: what stands in brackets in a path or an answer is no markup.
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False, emoji=False)
    # A log file is read in a window wider than the 80 columns that stand for "unknown".
    console.width = console.width if console.is_terminal else max(console.width, 120)
    console.print(table)


def iso_date(option: str, text: str) -> str:
    """A date in one of ISO 8601's forms as ``2026-06-01``.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ConfigurationError(f"{option} {text} is no date: {error}", remedy="Write it as 2026-06-01") from error


def read_model(path: Path, model: type[Model]) -> Model:
    """A result that another command printed with ``--json``.

    Raises:
        ConfigurationError: the file is missing, or does not hold such a result.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot be read: {error.strerror}", where=path, remedy="Name a file") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(
            f"not a {model.__name__}: {place} {first['msg']}", where=path, remedy="Make it with --json"
        ) from error


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """End a command with one clear line and exit code 1 (75 when trying again may help) for our own errors."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except FinetuneError as error:
            err.print(f"error: {error}", style="red", markup=False)
            raise typer.Exit(EXIT_TRANSIENT if isinstance(error, TransientError) else 1) from error
        except OSError as error:
            if error.filename is None:
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            err.print(f"error: {error.strerror} [{error.filename}]", style="red", markup=False)
            raise typer.Exit(EXIT_TRANSIENT if full else 1) from error

    return wrapped
