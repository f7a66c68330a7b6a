"""Which base models a client may name."""

from __future__ import annotations

import re

from h2o_gateway.models import ExperimentRequest
from h2o_gateway.settings import PREFIX, Settings

# Never a path: a client does not choose what is read on this machine.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]*", re.ASCII)


def check_base_model(settings: Settings, request: ExperimentRequest) -> list[str]:
    """Why the base model cannot be had, if it cannot."""
    revision = request.base_model_revision
    if revision is not None and not _REVISION.fullmatch(revision):
        return ["base_model_revision: no branch, tag or commit"]
    if request.base_model in settings.model_paths:
        return []
    known = ", ".join(settings.model_paths) or "none"
    if not settings.allow_hub:
        return [f"base_model: not one of {PREFIX}MODELS ({known})"]
    if not _HUB_NAME.fullmatch(request.base_model):
        return [f"base_model: neither one of {PREFIX}MODELS ({known}) nor a hub name such as org/model"]
    return []
