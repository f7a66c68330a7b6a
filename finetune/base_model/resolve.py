"""From the setting ``BASE_MODEL_NAME`` to a base model in a local directory."""

from __future__ import annotations

from pathlib import Path

from finetune.base_model.directory import check_model_directory, directory_fingerprint
from finetune.base_model.embedded import make_embedded_model
from finetune.base_model.hub import fetch_from_hub
from finetune.base_model.models import BaseModelRef
from finetune.base_model.names import SHORT_NAMES
from finetune.errors import BaseModelError
from finetune.progress import Progress, ignore_progress

SETTING = "BASE_MODEL_NAME"


def resolve_base_model(
    name: str | None,
    *,
    cache_dir: Path,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    on_progress: Progress = ignore_progress,
    endpoint: str | None = None,
) -> BaseModelRef:
    """Bring the base model into a local directory and check it.

    Args:
        name: None for the embedded model, a local directory, a name of `SHORT_NAMES`, or a repository
            on the Hugging Face hub such as ``org/model``.
        cache_dir: where the embedded model, the hub's cache and fingerprints are kept.
        revision: branch, tag or commit of a hub repository.
        token: the hub's access token, for gated and private repositories.
        trust_remote_code: fetch the repository's Python files too, and let them run.
        weights: False fetches and checks configuration, tokenizer and chat template only.
        on_progress: told about pre-training and downloads.
        endpoint: the hub's address; the client's own (``HF_ENDPOINT``) where None.

    Raises:
        BaseModelError: the name can't be resolved or reached, or what it names is incomplete.
        StorageFullError: the disk is full.
    """
    if name is None:
        return make_embedded_model(cache_dir, on_progress=on_progress)
    local = Path(name).expanduser()
    if local.is_dir():
        check_model_directory(local, weights=weights)
        return BaseModelRef(
            name=name,
            path=local.absolute(),
            revision=None,
            fingerprint=directory_fingerprint(local, cache_dir=cache_dir, weights=weights),
            trust_remote_code=trust_remote_code,
        )
    if name.startswith(("/", "./", "../", "~")):
        raise BaseModelError(
            "the base model's directory does not exist",
            where=f"{SETTING}={name}",
            remedy="Give an existing directory in Hugging Face's layout, or a name on the hub such as org/model",
        )
    repository = SHORT_NAMES.get(name.lower(), name)
    path, commit = fetch_from_hub(
        repository,
        given=name,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        weights=weights,
        on_progress=on_progress,
        endpoint=endpoint,
    )
    check_model_directory(path, weights=weights)
    return BaseModelRef(
        name=repository, path=path, revision=commit, fingerprint=commit, trust_remote_code=trust_remote_code
    )
