"""`lora-assets push`: a version to a repository on the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.errors import ArtifactError, ConfigurationError
from finetune.registry.promotion import champion
from finetune.registry.store import get_version
from lora_assets.cli.console import Json, plain_errors
from lora_assets.cli.tools import progress, show
from lora_assets.settings import load_settings


@plain_errors
def push(
    version: Annotated[str | None, typer.Argument(help="A version, such as v3; without it, the champion.")] = None,
    repo: Annotated[str | None, typer.Option(help="owner/name on the hub; default: HUB_REPO.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="adapter, merged or gguf, once for each; default: all that was made.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Push a version's adapter, merged model and GGUF to a repository on the hub, with the token HF_TOKEN.

    What the repository holds already is not sent again; its hashes are compared with the files' afterwards.
    """
    from finetune.export.hub import hub_files, push_to_hub

    settings = load_settings()
    target = repo or settings.hub_repo
    if target is None or target.count("/") != 1:
        raise ConfigurationError(
            "no repository is named", where="HUB_REPO", remedy="Set it to owner/name, or use --repo"
        )
    registry = settings.layout.registry
    chosen = champion(registry) if version is None else get_version(registry, version)
    if chosen is None:
        raise ArtifactError("nobody reigns yet", where=registry, remedy="Name a version")
    pushed = push_to_hub(
        hub_files(settings.layout, chosen, target.split("/")[1], part),
        repo=target,
        token=settings.hf_token.get_secret_value() if settings.hf_token else None,
        private=settings.hub_private,
        message=f"{chosen.version} of {settings.pipeline_name} (training {chosen.run_id})",
        on_progress=progress(as_json),
    )
    show(pushed, as_json)
