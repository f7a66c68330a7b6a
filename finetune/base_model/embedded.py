"""The embedded base model: made once, cached, and handed out."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from finetune.base_model.models import BaseModelRef
from finetune.base_model.pretraining import Recipe, chat_template, pretrain
from finetune.errors import ArtifactError, BaseModelError
from finetune.progress import Progress, ignore_progress
from finetune.publishing import TEMPORARY_MARK, Manifest, is_complete, publish_directory, read_manifest, sha256_json

EMBEDDED_NAME = "lora-assets-tiny"
_KIND = "base_model"


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hexadecimal digits that change whenever the model would."""
    phrases = files("finetune.base_model").joinpath("phrases.json").read_text(encoding="utf-8")
    return sha256_json([asdict(recipe), phrases, chat_template()])[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The kernel drops the lock when its holder dies, however it dies.
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def read_embedded_model(directory: Path) -> BaseModelRef:
    """An embedded model that was made before.

    Raises:
        BaseModelError: it is incomplete or was altered.
    """
    try:
        manifest = read_manifest(directory, kind=_KIND, verify="hashes")
    except ArtifactError as error:
        raise BaseModelError(
            f"the embedded base model is damaged: {error.what}",
            where=error.where,
            remedy=f"Delete {directory} and run again: it is made anew in about a minute",
        ) from error
    return BaseModelRef(
        name=EMBEDDED_NAME, path=directory, revision=None, fingerprint=_fingerprint(manifest), embedded=True
    )


def _fingerprint(manifest: Manifest) -> str:
    return sha256_json({name: entry.sha256 for name, entry in manifest.outputs.items()})


def make_embedded_model(
    cache_dir: Path, *, on_progress: Progress = ignore_progress, recipe: Recipe | None = None
) -> BaseModelRef:
    """The project's own tiny model, pre-trained on first use.

    It lies in ``<cache_dir>/embedded-<hash of the recipe>/`` in Hugging Face's layout. Processes that
    ask at the same time wait for the one that makes it.

    Raises:
        BaseModelError: the cached model is incomplete or was altered.
        StorageFullError: the disk is full.
    """
    recipe = recipe or Recipe()
    directory = cache_dir.absolute() / f"embedded-{recipe_hash(recipe)}"
    if not is_complete(directory):
        with _locked(directory.with_name(f".{directory.name}.lock")):
            if not is_complete(directory):
                # Only the lock's holder writes here: what lies about was left by one who was killed.
                for leaving in directory.parent.glob(f".{directory.name}{TEMPORARY_MARK}*"):
                    shutil.rmtree(leaving)
                started = time.monotonic()
                with publish_directory(directory, kind=_KIND) as staging:
                    figures = pretrain(recipe, staging.path, on_progress=on_progress)
                    staging.parameters = asdict(recipe)
                    staging.results = {**figures, "seconds": round(time.monotonic() - started, 1)}
    return read_embedded_model(directory)
