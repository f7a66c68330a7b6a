"""`lora-assets reproduce`: do again what a manifest tells of, and compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import FinetuneError, TransientError
from finetune.publishing import sha256_file
from finetune.reproduction.at_hand import Places, look_for_inputs
from finetune.reproduction.check import Checked, check, select
from finetune.reproduction.models import EXPERIMENT_MANIFEST
from finetune.reproduction.reproduce import TOLERANCE
from lora_assets.cli.console import EXIT_TRANSIENT, Json, err, out, print_json, print_table
from lora_assets.cli.tools import progress
from lora_assets.settings import Settings, load_settings

if TYPE_CHECKING:
    from finetune.reproduction.reproduce import Reproduced

EXIT_DIFFERENT, EXIT_CANNOT = 1, 2


def reproduce(
    manifest: Annotated[Path, typer.Argument(help="experiment_manifest.json, or the directory that holds it.")],
    output: Annotated[
        Path | None, typer.Option(help="Directory for what is made; default: one under DATA_ROOT/work.")
    ] = None,
    training: Annotated[list[str] | None, typer.Option(help="Only this training; may be given several times.")] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="See what is at hand; run nothing.")] = False,
    tolerance: Annotated[
        float, typer.Option(min=0, help="The most by which a weight or loss may differ, where bits need not be equal.")
    ] = TOLERANCE,
    as_json: Json = False,
) -> None:
    """Prepare, train and evaluate again what a manifest tells of, in a place of its own, and compare.

    Exit code 0: everything came out again; 1: something is different; 2: it cannot be run, and why; 75: try again
    later. On a CPU with the same libraries the adapter must be the same to the bit.
    """
    try:
        code = _reproduce(manifest, output, training or [], check_only, tolerance, as_json)
    except FinetuneError as error:
        err.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(EXIT_TRANSIENT if isinstance(error, TransientError) else EXIT_CANNOT) from error
    except OSError as error:
        # Nothing was compared, so that nothing can be said to be different.
        err.print(f"error: {error.strerror} [{error.filename}]", style="red", markup=False)
        raise typer.Exit(EXIT_CANNOT) from error
    raise typer.Exit(code)


def places_of(settings: Settings) -> Places:
    """Where the settings say that things lie."""
    return Places(
        layout=settings.layout,
        exports=settings.exports,
        deletion_list=settings.deletion_list,
        hub_token=settings.hf_token.get_secret_value() if settings.hf_token else None,
        trust_remote_code=settings.trust_remote_code,
    )


def _reproduce(
    manifest: Path, output: Path | None, chosen: list[str], check_only: bool, tolerance: float, as_json: bool
) -> int:
    from finetune.reproduction.reproduce import reproduce as run_again
    from lora_assets.start import deletions_of

    settings, report = load_settings(), progress(as_json)
    selection = select(manifest, chosen)
    places = replace(places_of(settings), deletions=deletions_of(settings), id_field=settings.id_field)
    at_hand = look_for_inputs(selection.manifest.inputs, places, weights=not check_only, on_progress=report)
    checked = check(selection, at_hand, places)
    if not as_json:
        _print_checked(checked)
    reproduced = None
    if not checked.refusals and not check_only:
        reproduced = run_again(
            selection,
            at_hand,
            places,
            output=output or _default_output(settings, manifest),
            tolerance=tolerance,
            not_prepared=checked.not_prepared,
            on_progress=report,
        )
        if not as_json:
            _print_reproduced(reproduced)
    if as_json:
        result = {**reproduced.model_dump(mode="json"), "equal": reproduced.equal} if reproduced else None
        print_json({"checked": checked.model_dump(mode="json"), "reproduced": result})
    if checked.refusals:
        return EXIT_CANNOT
    return 0 if reproduced is None or reproduced.equal else EXIT_DIFFERENT


def _default_output(settings: Settings, manifest: Path) -> Path:
    """The same place for the same manifest, so that one that was killed goes on."""
    digest = sha256_file(manifest / EXPERIMENT_MANIFEST if manifest.is_dir() else manifest)
    return settings.layout.work(f"reproduce-{digest[:12]}")


def _print_checked(checked: Checked) -> None:
    rows = [
        [found.kind, found.name, found.expected[:12], found.state, str(found.path or "") or found.reason]
        for found in checked.inputs
    ]
    print_table("inputs", ["input", "name", "SHA-256 or fingerprint", "state", "where"], rows)
    if checked.differences:
        rows = [[each.what, each.recorded, each.here, "yes" if each.decides else ""] for each in checked.differences]
        print_table("otherwise than then", ["", "then", "here", "may change the adapter"], rows)
    for fingerprint, reason in checked.not_prepared.items():
        out.print(f"dataset {fingerprint} is taken as it lies: {reason}", markup=False)
    for refusal in checked.refusals:
        err.print(f"cannot be run: {refusal}", style="red", markup=False)


def _print_reproduced(reproduced: Reproduced) -> None:
    if reproduced.datasets:
        rows = [
            [each.fingerprint, each.reproduced_fingerprint, "same" if each.equal else ", ".join(each.differing)]
            for each in reproduced.datasets
        ]
        print_table("datasets, prepared again", ["then", "now", "files"], rows)
    rows = [
        [each.run_id, each.verdict, each.adapter_hash[:12], each.reproduced_hash[:12], each.reason]
        for each in reproduced.trainings
    ]
    print_table("trainings", ["run", "result", "hash then", "hash now", "why"], rows)
    rows = [
        [each.run_id, name, f"{once:.6f}", f"{again:.6f}", f"{again - once:+.2g}"]
        for each in reproduced.trainings
        for name, (once, again) in each.metrics.items()
    ]
    if rows:
        print_table("metrics", ["run", "metric", "then", "now", "difference"], rows)
    out.print(f"{'equal' if reproduced.equal else 'different'}: {reproduced.output}", markup=False)
