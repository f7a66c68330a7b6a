"""What a model's own card says of its licence."""

from __future__ import annotations

from pathlib import Path


def read_licence(model_dir: Path) -> str:
    """The licence that the model's card states, by the hub's name for it, else ``other``."""
    try:
        lines = (model_dir / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return "other"
    stated = [line.removeprefix("license:").strip() for line in lines[:60] if line.startswith("license:")]
    return stated[0] if stated and stated[0] else "other"
