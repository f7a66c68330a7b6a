"""What model cards say of a base model, in the hub's terms."""

from __future__ import annotations

import json
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def read_licence(model_dir: Path) -> str:
    """The licence that the model's card states, by the hub's name for it, else ``other``."""
    try:
        lines = (model_dir / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return "other"
    stated = [line.removeprefix("license:").strip() for line in lines[:60] if line.startswith("license:")]
    return stated[0] if stated and stated[0] else "other"


def base_model_line(name: str) -> str:
    """The card's ``base_model`` with its line end; nothing for a path, which the hub would refuse."""
    return f"base_model: {json.dumps(name)}\n" if _HUB_NAME.fullmatch(name) else ""
