"""`lora-assets registry`: versions, and who reigns."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import FinetuneError
from finetune.registry.models import RegisteredVersion
from lora_assets.cli.console import Json, err, out, plain_errors, print_json, print_table
from lora_assets.cli.tools import progress
from lora_assets.cli.tools import show as show_value
from lora_assets.settings import Settings, load_settings

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
    """Make a version champion, and Ollama's tag `champion` its model; the next run of its date makes its exports.

    Promoting the version that reigns already changes nothing in the registry, and sets the tag again.
    """
    from finetune.registry.promotion import promote as promote_version

    _show_served(promote_version(registry(), version, reason=reason, by=getpass.getuser()), as_json)


@app.command(epilog="Example: lora-assets registry rollback --reason 'complaints'")
@plain_errors
def rollback(reason: Reason = "by hand", as_json: Json = False) -> None:
    """Make the version that reigned before champion again, and Ollama's tag `champion` its model."""
    from finetune.registry.promotion import rollback as roll_back

    _show_served(roll_back(registry(), reason=reason, by=getpass.getuser()), as_json)


def _show_served(version: RegisteredVersion, as_json: bool) -> None:
    """Show the champion once the served tag has followed it, where a server is set."""
    settings = load_settings()
    served = None
    if settings.ollama_host and "ollama" in settings.targets:
        served = _serve(settings, version)
    if as_json:
        print_json(version.model_dump(mode="json") | {"served": served})
    else:
        show_value(version, as_json=False)


def _serve(settings: Settings, version: RegisteredVersion) -> str | None:
    from resources.ollama import CHAMPION_TAG, OllamaServer

    tag = f"{settings.ollama_model_name}:{CHAMPION_TAG}"
    try:
        served = OllamaServer(host=settings.ollama_host, timeout=600).serve_champion(
            settings.layout, settings.ollama_model_name, on_progress=progress(quiet=False)
        )
    except FinetuneError as error:
        # The registry has changed already: say so, and what makes the server follow.
        raise type(error)(
            f"{version.version} reigns, but {tag} on the server is not its model yet: {error.what}",
            where=error.where,
            remedy=f"{error.remedy}; then run: lora-assets registry promote {version.version}",
        ) from error
    if served:
        err.print(f"{tag} is {served} now", markup=False)
    else:
        err.print(f"{version.version} has no exports yet: the next run of its date makes them and moves {tag}")
    return served


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


@app.command(epilog="Example: lora-assets registry gc --keep 10 --dry-run")
@plain_errors
def gc(
    keep: Annotated[int, typer.Option(min=1, help="Newest versions that are left alone.")] = 10,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove the weights of old challengers; their manifests stay, and every version that ever reigned."""
    from finetune.registry.store import collect_garbage, find_garbage, size_on_disk

    rows = [(each.version, each.run_id, size_on_disk(each)) for each in find_garbage(registry(), keep=keep)]
    if not dry_run:
        collect_garbage(registry(), keep=keep, by=getpass.getuser())
    freed = sum(size for *_, size in rows)
    if as_json:
        versions = [{"version": version, "run_id": run_id, "freed": size} for version, run_id, size in rows]
        print_json({"dry_run": dry_run, "freed": freed, "versions": versions})
        return
    if rows:
        print_table(
            None, ["version", "run", "MB freed"], [[name, run, f"{size / 1e6:.1f}"] for name, run, size in rows]
        )
    out.print(f"{'would remove' if dry_run else 'removed'} the weights of {len(rows)} versions: {freed / 1e6:.1f} MB")


@app.command(epilog="Example: lora-assets registry rebuild --dry-run")
@plain_errors
def rebuild(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say who reigns, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Read all manifests and the history anew, and restore the champion's pointer from them."""
    from finetune.registry.promotion import CHAMPION_POINTER, pointed_at
    from finetune.registry.promotion import rebuild as rebuild_registry
    from finetune.registry.store import list_versions

    before = pointed_at(registry())
    versions = list_versions(registry()) if dry_run else rebuild_registry(registry())
    reigning = next((each.version for each in versions if each.status == "champion"), None)
    if as_json:
        print_json({"dry_run": dry_run, "versions": len(versions), "champion": reigning, "pointed_at": before})
        return
    out.print(f"{len(versions)} versions, {reigning or 'none of which'} reigns")
    if before == reigning:
        out.print(f"{CHAMPION_POINTER} was right")
    else:
        verb = "would be" if dry_run else "was"
        out.print(f"{CHAMPION_POINTER} {verb} rewritten: it pointed at {before or 'nothing'}")
