"""`lora-assets drift`: the weekly look at the champion, without the daemon."""

from __future__ import annotations

import typer

from lora_assets.cli.console import EXIT_TRANSIENT, Json, err, out, plain_errors, print_json
from lora_assets.settings import load_settings


@plain_errors
def drift(as_json: Json = False) -> None:
    """Evaluate the champion on all held-out data that arrived since its training.

    Exits with 0 if its loss is within DRIFT_TOLERANCE, with 1 if it is not or could not be measured, with 75
    if trying again later may help.
    """
    from lora_assets.cli.summary import print_outcome
    from lora_assets.runner import run_drift

    outcome = run_drift(load_settings())
    if as_json:
        print_json(outcome.model_dump())
    else:
        print_outcome(outcome)
        if not outcome.failed_checks and outcome.error is None:
            out.print("the champion is as good on what is new as before, within DRIFT_TOLERANCE")
    for what in [outcome.error] if outcome.error else outcome.failed_checks:
        err.print(f"error: {what}", style="red", markup=False)
    if outcome.error or outcome.failed_checks:
        raise typer.Exit(EXIT_TRANSIENT if outcome.transient else 1)
