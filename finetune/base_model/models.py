"""A base model that is at hand."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class BaseModelRef(BaseModel):
    """A base model in a local directory in Hugging Face's layout.

    `fingerprint` identifies its weights, configuration and tokenizer: the hub's commit where there is
    one, else a SHA-256. `trust_remote_code` allows Python files of its directory to run.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    name: str
    path: Path
    revision: str | None
    fingerprint: str
    embedded: bool = False
    trust_remote_code: bool = False
