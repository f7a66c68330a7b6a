"""No date, id or name that anyone can type leads out of the data root."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import ConfigurationError
from finetune.layout import DataLayout

LAYOUT = DataLayout(Path("/data"))
PATHS: dict[str, Callable[[str], Path]] = {
    "the date of a dataset": lambda name: LAYOUT.prepared(name, "f"),
    "the fingerprint of a dataset": lambda name: LAYOUT.prepared("2026-06-01", name),
    "an adapter's run": LAYOUT.adapter,
    "a model's run": lambda name: LAYOUT.model(name, "merged"),
    "a model's part": lambda name: LAYOUT.model("r", name),
    "the work of a run": LAYOUT.work,
    "an experiment": LAYOUT.experiment,
}
HOSTILE = [
    "../../x",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "9999/../../x",
    "a\\b",
    "x\0y",
    "a\nb",
    "~",
    " a",
    "-rf",
    "a" * 201,
]


@pytest.mark.parametrize("what", PATHS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_is_refused(what: str, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be part of a path"):
        PATHS[what](name)


@pytest.mark.parametrize("what", PATHS)
@pytest.mark.parametrize("name", ["2026-06-01", "a1b2c3", "hour=5", "v1.2+x"])
def test_a_usual_name_stays_below_the_data_root(what: str, name: str) -> None:
    path = PATHS[what](name)
    assert name in path.parts
    assert path.resolve().is_relative_to(LAYOUT.root)
