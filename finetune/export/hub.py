"""Pushing what was made to a repository on the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ArtifactError, ConfigurationError, ExportError, FinetuneError, RemoteError
from finetune.export.models import GgufExport, HubPush
from finetune.layout import DataLayout
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import is_complete, read_manifest, sha256_file
from finetune.registry.models import RegisteredVersion
from finetune.registry.store import verify_version

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

PARTS = ("adapter", "merged", "gguf")
_CARD = "README.md"
_PATHS_AT_ONCE = 100
_BUSY = (408, 429, 500, 502, 503, 504)


def hub_files(
    layout: DataLayout, version: RegisteredVersion, name: str, parts: Sequence[str] | None = None
) -> dict[str, Path]:
    """What of a version is pushed, by its path in the repository.

    The merged model and the quantized GGUF lie at the top, where transformers, vLLM, Ollama and LM Studio
    look for them; the adapter and its GGUF in ``adapter/``. Every file is hashed again first.

    Args:
        layout: where artifacts lie.
        version: the registered version.
        name: the repository's own name, part of the GGUF file's.
        parts: which of `PARTS` to push; None: all that was made of the version.

    Raises:
        ConfigurationError: there is no such part.
        ArtifactError: a part that was asked for was not made, or a file was altered.
    """
    if unknown := set(parts or ()) - set(PARTS):
        raise ConfigurationError(f"no part is named {', '.join(unknown)}", remedy=f"Name {', '.join(PARTS)}")
    chosen = parts or [part for part in PARTS if _is_made(layout, version, part)]
    files: dict[str, Path] = {}
    for part in chosen:
        if not _is_made(layout, version, part):
            raise ArtifactError(
                f"{version.version} has no {part} to push",
                where=version.stored_path if part == "adapter" else layout.model(version.run_id, part),
                remedy="Promote it and run its date again, or push another part",
            )
        if part == "adapter":
            verify_version(layout.registry, version.version)
            manifest = read_manifest(version.stored_path)
            own = sorted(set(manifest.outputs) - {"experiment_manifest.json"})
            files |= {f"adapter/{file}": version.stored_path / file for file in own}
        elif part == "merged":
            directory = layout.model(version.run_id, part)
            files |= {file: directory / file for file in read_manifest(directory, verify="hashes").outputs}
        else:
            directory = layout.model(version.run_id, part)
            export = GgufExport(path=directory, **read_manifest(directory, verify="hashes").results)
            files[f"{name}-{export.quantized.quantization}.gguf"] = directory / export.quantized.path.name
            if export.adapter is not None:
                files["adapter/adapter.gguf"] = directory / export.adapter.path.name
    card = version.stored_path / _CARD
    if _CARD not in files and card.is_file():
        files[_CARD] = card
    return files


def _is_made(layout: DataLayout, version: RegisteredVersion, part: str) -> bool:
    if part == "adapter":
        return version.status != "collected"
    return is_complete(layout.model(version.run_id, part))


def push_to_hub(
    files: Mapping[str, Path],
    *,
    repo: str,
    token: str | None,
    private: bool,
    message: str,
    on_progress: Progress = ignore_progress,
) -> HubPush:
    """Make a repository hold these files, in one commit, and compare its hashes with theirs.

    What it holds already is not sent again, and nothing is committed if that is all. Other files stay.

    Args:
        files: local files by their path in the repository.
        repo: ``owner/name``; made if there is none.
        token: an access token that may write to it.
        private: whether only its owner may see it; a public repository is then refused.
        message: the commit's.
        on_progress: told of the steps.

    Raises:
        ConfigurationError: no token, or the repository is public.
        ExportError: the hub refuses, or holds other bytes than were sent.
        RemoteError: the hub does not answer, or is busy.
    """
    if token is None:
        raise ConfigurationError("no token of the hub is set", where="HF_TOKEN", remedy="Set it to one that may write")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(token=token)
    with _errors(api.endpoint, repo):
        on_progress(ProgressEvent(f"hub: {repo}", 0, len(files), "files"))
        api.create_repo(repo, private=private, exist_ok=True)
        before = api.repo_info(repo)
        if private and before.private is False:
            raise ConfigurationError(
                "the repository is public, and HUB_PRIVATE asks for a private one",
                where=f"{api.endpoint}/{repo}",
                remedy="Make it private, choose another one, or set HUB_PRIVATE=false",
            )
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        commit = api.create_commit(repo, operations, commit_message=message)
        paths = list(files)
        found: dict[str, RepoFile] = {}
        for first in range(0, len(paths), _PATHS_AT_ONCE):
            answer = api.get_paths_info(repo, paths[first : first + _PATHS_AT_ONCE], revision=commit.oid)
            found |= {file.path: file for file in answer if isinstance(file, RepoFile)}
    for done, (name, file) in enumerate(files.items(), 1):
        if name not in found or not _is_equal(file, found[name]):
            raise ExportError(
                f"the hub does not hold {name} as it was sent",
                where=f"{api.endpoint}/{repo}/tree/{commit.oid}",
                remedy="Push again",
            )
        on_progress(ProgressEvent(f"hub: {repo}", done, len(files), "files"))
    return HubPush(
        repo=repo,
        url=f"{api.endpoint}/{repo}",
        commit=commit.oid,
        private=bool(before.private),
        files=paths,
        size=sum(file.stat().st_size for file in files.values()),
        unchanged=commit.oid == before.sha,
    )


def _is_equal(local: Path, remote: RepoFile) -> bool:
    """By SHA-256 for large files, by git's SHA-1 of a blob for others."""
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == sha256_file(local))
    content = local.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(remote.blob_id == blob.hexdigest())


@contextmanager
def _errors(endpoint: str, repo: str) -> Iterator[None]:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"{endpoint}/{repo}"
    try:
        yield
    except FinetuneError:
        raise
    except (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled, RuntimeError, ValueError) as raised:
        # An upload's error is wrapped in a RuntimeError that names the file.
        error = raised.__cause__ if isinstance(raised, RuntimeError) and raised.__cause__ else raised
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            said = error.server_message or f"HTTP {status}"
            if status in _BUSY:
                raise RemoteError(f"the hub is busy: {said}", where=where, remedy="Try again later") from error
            if status in (401, 403, 404):
                raise ExportError(
                    f"the hub refuses: {said}", where=where, remedy="Set HF_TOKEN to a token that may write there"
                ) from error
            raise ExportError(f"the hub refuses: {said}", where=where, remedy="Correct it and push again") from error
        if isinstance(error, httpx2.TransportError):
            raise RemoteError(
                f"the hub cannot be reached: {error}", where=where, remedy="Try again later, or correct HF_ENDPOINT"
            ) from error
        raise ExportError(f"the push failed: {error}", where=where, remedy="Correct it and push again") from error
