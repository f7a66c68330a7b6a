"""Which version a date's training goes on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.registry.champion import champion_before
from finetune.registry.models import RegisteredVersion
from finetune.registry.promotion import promote, rollback

Register = Callable[..., RegisteredVersion]


def test_it_is_the_last_to_reign_of_the_versions_of_earlier_dates(
    registry: Path, make_adapter: Callable[..., Path], register: Register, tmp_path: Path
) -> None:
    assert champion_before(registry, "2026-06-02") is None
    dates = ["2026-06-01", "2026-06-02", "2026-06-04"]
    versions = [
        register(registry, make_adapter(tmp_path / date, seed), lineage={"date": date})
        for seed, date in enumerate(dates)
    ]
    assert champion_before(registry, "2026-06-05") is None, "none has reigned"
    for version in versions:
        promote(registry, version.version, reason="better", by="test")

    def before(date: str) -> str | None:
        found = champion_before(registry, date)
        return found.version if found else None

    assert before("2026-06-05") == "v3"
    # A date that is made again starts where it started, and knows nothing of later ones.
    assert before("2026-06-04") == before("2026-06-03") == "v2"
    assert before("2026-06-02") == "v1"
    assert before("2026-06-01") is None
    rollback(registry, reason="worse after all", by="test")
    assert before("2026-06-05") == "v2"
