"""The documented table of short names is the one in force."""

from pathlib import Path

from finetune.base_model.names import SHORT_NAMES


def test_the_documented_short_names_are_the_ones_in_force() -> None:
    page = (Path(__file__).parents[3] / "docs" / "base-models.md").read_text(encoding="utf-8")
    table = page.split("## Short names")[1].split("## The embedded")[0]
    rows = [line.split("`") for line in table.splitlines() if line.startswith("| `")]
    assert {row[1]: row[3] for row in rows} == SHORT_NAMES
