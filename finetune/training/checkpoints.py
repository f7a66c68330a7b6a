"""Checkpoints of a training: which are whole, and which to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import ConfigurationError
from finetune.publishing import sha256_file, write_json_atomically

_MARK = "complete.json"
_PREFIX = "checkpoint-"


def seal_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Declare a checkpoint whole: its files' SHA-256 and our own `state` go into ``complete.json``, written last."""
    files = {file.name: sha256_file(file) for file in sorted(directory.iterdir()) if file.name != _MARK}
    write_json_atomically(directory / _MARK, {"files": files, "state": state})


def newest_complete(checkpoints: Path, *, before: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files are as they were when it was sealed, and its state.

    A checkpoint that was not finished or was damaged since is skipped for the one before it. With `before`,
    only checkpoints of earlier steps count.
    """
    found = [path for path in checkpoints.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    for path in sorted(found, key=step_of, reverse=True):
        state = _state_if_whole(path) if before is None or step_of(path) < before else None
        if state is not None:
            return path, state
    return None


def named_checkpoint(path: Path, run_id: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint that somebody names, and its state.

    Args:
        path: its directory, ``checkpoint-<step>``.
        run_id: the training that shall go on from it.

    Raises:
        ConfigurationError: there is no whole checkpoint, or it is that of another training.
    """
    state = _state_if_whole(path) if path.name.removeprefix(_PREFIX).isdigit() else None
    if state is None:
        raise ConfigurationError(
            "no whole checkpoint here",
            where=path,
            remedy=f"Name a directory {_PREFIX}<step> whose files are as they were written",
        )
    if state["run_id"] != run_id:
        raise ConfigurationError(
            f"this checkpoint belongs to the training {state['run_id']}, not to {run_id}",
            where=path,
            remedy="Give the dataset, the plan and the base model that it was made with",
        )
    return path, state


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was taken after."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _state_if_whole(checkpoint: Path) -> dict[str, Any] | None:
    try:
        seal = json.loads((checkpoint / _MARK).read_bytes())
        whole = all(sha256_file(checkpoint / name) == digest for name, digest in seal["files"].items())
        state: dict[str, Any] = seal["state"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return state if whole else None
