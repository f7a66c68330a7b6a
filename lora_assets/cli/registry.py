"""`lora-assets registry`: versions, and who reigns."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

from lora_assets.cli.console import Json, out, plain_errors, print_json, print_table
from lora_assets.cli.tools import show as show_value
from lora_assets.settings import load_settings

app = typer.Typer(help="Versions of the adapter, and which one reigns.", no_args_is_help=True)

Version = Annotated[str, typer.Argument(help="A version, such as v3.")]
Reason = Annotated[str, typer.Option(help="Why, for the history.")]


def registry() -> Path:
    """The registry of the configured data root."""
    return load_settings().layout.registry


@app.command("list", epilog="Example: lora-assets registry list --json")
@plain_errors
def list_all(as_json: Json = False) -> None:
    """All versions with their status and the reason for it."""
    from finetune.registry.store import list_versions

    versions = list_versions(registry())
    if as_json:
        print_json([version.model_dump(mode="json") for version in versions])
        return
    if not versions:
        out.print("no version yet")
        return
    print_table(
        None,
        ["version", "status", "run", "held-out loss", "why"],
        [
            [v.version, v.status, v.run_id, f"{v.metrics.get('eval_loss', float('nan')):.4f}", v.reason]
            for v in versions
        ],
    )


@app.command(epilog="Example: lora-assets registry show v3")
@plain_errors
def show(version: Version, as_json: Json = False) -> None:
    """One version with its metrics, tags and lineage."""
    from finetune.registry.store import get_version

    show_value(get_version(registry(), version), as_json)


@app.command(epilog="Example: lora-assets registry promote v3 --reason 'better tone'")
@plain_errors
def promote(version: Version, reason: Reason = "by hand", as_json: Json = False) -> None:
    """Make a version champion; its exports are made by the next run of its date."""
    from finetune.registry.promotion import promote as promote_version

    show_value(promote_version(registry(), version, reason=reason, by=getpass.getuser()), as_json)


@app.command(epilog="Example: lora-assets registry rollback --reason 'complaints'")
@plain_errors
def rollback(reason: Reason = "by hand", as_json: Json = False) -> None:
    """Make the version that reigned before champion again."""
    from finetune.registry.promotion import rollback as roll_back

    show_value(roll_back(registry(), reason=reason, by=getpass.getuser()), as_json)


@app.command(epilog="Example: lora-assets registry verify")
@plain_errors
def verify(
    version: Annotated[str | None, typer.Argument(help="A version; without it, all of them.")] = None,
    as_json: Json = False,
) -> None:
    """Hash every file again; ends with an error at the first that was altered."""
    from finetune.registry.store import list_versions, verify_version

    names = [version] if version else [each.version for each in list_versions(registry())]
    verified = [verify_version(registry(), name).version for name in names]
    if as_json:
        print_json({"verified": verified})
    else:
        out.print(f"unaltered: {', '.join(verified) or 'no version yet'}")
