"""Models from the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

from pathlib import Path

from finetune.base_model.names import SHORT_NAMES
from finetune.errors import BaseModelError, full_disk_named
from finetune.progress import Progress, ProgressEvent

_SMALL = ["README.md", "*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*"]


def fetch_from_hub(
    repository: str,
    *,
    given: str,
    cache_dir: Path,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    weights: bool,
    on_progress: Progress,
    endpoint: str | None = None,
) -> tuple[Path, str]:
    """Download a repository, or take it from the cache when the hub can't be reached.

    Args:
        repository: ``org/model``.
        given: what the setting said, for messages.
        cache_dir: the hub's cache is ``<cache_dir>/hub``.
        revision: branch, tag or commit; the default branch where None.
        token: access token.
        trust_remote_code: fetch Python files too.
        weights: False leaves the weights out.
        on_progress: told before and after.
        endpoint: the hub's address; the client's own (``HF_ENDPOINT``) where None.

    Returns:
        The snapshot's directory and its commit.

    Raises:
        BaseModelError: no such repository or revision, no access, or neither reachable nor cached.
        StorageFullError: the disk is full.
    """
    # The transport of the hub's client: a broken connection reaches us as its error.
    import httpx2
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = endpoint or constants.ENDPOINT
    cache = cache_dir / "hub"
    where = f"BASE_MODEL_NAME={given}"
    # Whoever writes an owner means none of them.
    known = "" if "/" in given else f" ({', '.join(SHORT_NAMES)})"
    tried = (
        f"tried the directory {Path(given).expanduser().absolute()}, the short names{known}, and the hub repository "
        f"{repository} at revision {revision or 'main'} on {endpoint}"
    )

    small = [*_SMALL, *(["*.py"] if trust_remote_code else [])]

    def snapshot(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                token=token,
                endpoint=endpoint,
                cache_dir=cache,
                allow_patterns=patterns,
                ignore_patterns=["original/*", "onnx/*"],
            )
        )

    try:
        with full_disk_named(cache):
            on_progress(ProgressEvent(f"fetching {repository}", 0, 1, "models"))
            found = snapshot([*small, "*.safetensors"] if weights else small)
            if weights and not any(found.glob("*.safetensors")):
                found = snapshot([*small, "*.bin"])
            on_progress(ProgressEvent(f"fetching {repository}", 1, 1, "models"))
            return found, found.name
    except GatedRepoError as error:
        raise BaseModelError(
            f"the base model is gated and this token has no access ({tried})",
            where=where,
            remedy=f"Accept its licence at {endpoint}/{repository} and set HF_TOKEN to a token of that account",
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(
            f"the base model has no such revision ({tried})",
            where=where,
            remedy="Set BASE_MODEL_REVISION to a branch, tag or commit of the repository, or unset it",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BaseModelError(
            f"no such base model, or it is private ({tried})",
            where=where,
            remedy="Correct BASE_MODEL_NAME: a directory, a short name or org/model; a private one needs HF_TOKEN",
        ) from error
    except (httpx2.HTTPError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise BaseModelError(
            f"the base model can't be reached and is not in the cache {cache} ({tried}): {reason}",
            where=where,
            remedy="Check the network and HF_ENDPOINT, or copy the model here and set BASE_MODEL_NAME to its "
            "directory; unset it for the embedded model",
        ) from error
