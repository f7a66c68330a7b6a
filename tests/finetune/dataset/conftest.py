"""Exports for the tests: directories of lines, prepared in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import PreparedDataset
from finetune.dataset.prepare import PrepareParameters, prepare_dataset
from finetune.layout import DataLayout

Prepare = Callable[..., PreparedDataset]


@pytest.fixture
def layout(tmp_path: Path) -> DataLayout:
    return DataLayout(tmp_path / "data")


@pytest.fixture
def prepare(layout: DataLayout) -> Prepare:
    """Write files (name to bytes) as the exports, replacing what was there, and prepare the newest date."""

    def run(files: Mapping[str, bytes], *, date: str | None = None, **options: Any) -> PreparedDataset:
        layout.exports.mkdir(parents=True, exist_ok=True)
        for old in layout.exports.iterdir():
            old.unlink()
        for name, content in files.items():
            (layout.exports / name).write_bytes(content)
        parameters = PrepareParameters(**{"eval_fraction": 0.5, **options.pop("parameters", {})})
        exports = discover_exports(layout.exports)
        return prepare_dataset(exports, date=date or exports[-1].date, layout=layout, parameters=parameters, **options)

    return run


@pytest.fixture
def pairs() -> Callable[..., bytes]:
    """Lines of numbered instruction and output records, half of them with Cyrillic text."""

    def lines(*numbers: int) -> bytes:
        return b"".join(
            orjson.dumps({"instruction": f"Питання {n}" if n % 2 else f"Question {n}", "output": f"Answer {n}"}) + b"\n"
            for n in numbers
        )

    return lines
