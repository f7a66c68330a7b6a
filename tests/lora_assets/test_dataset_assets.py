"""The asset `merged_dataset`, materialized: with clean exports, and with everything that can be left out."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from lora_assets.assets import dataset
from lora_assets.partitions import dataset_dates
from lora_assets.settings import Settings
from resources.artifact_store import ArtifactStore, ValueStore

DATE = "2026-06-01"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    exports = tmp_path / "datasets" / "brain"
    exports.mkdir(parents=True)
    lines = "".join(f'{{"id":"r{n}","text":"record {n}","quality":{n % 5}}}\n' for n in range(60))
    (exports / f"brain_dataset_{DATE}.jsonl").write_text(lines)
    return tmp_path


def materialize(
    monkeypatch: pytest.MonkeyPatch, root: Path, config: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    monkeypatch.setattr(dataset, "SETTINGS", Settings(data_root=root, **settings))
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(str(dataset_dates.name), [DATE])
        result = dg.materialize(
            [dataset.merged_dataset],
            instance=instance,
            partition_key=DATE,
            run_config={"ops": {"brain__merged_dataset": {"config": config or {}}}},
            resources={
                "store": ArtifactStore(data_root=str(root), pipeline="brain"),
                "io_manager": ValueStore(directory=str(root / "assets")),
            },
        )
    [event] = result.get_asset_materialization_events()
    return {name: value.value for name, value in event.materialization.metadata.items()}


def test_exports_without_a_single_reject_or_finding_have_tables_without_rows(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    metadata = materialize(monkeypatch, root)
    assert (metadata["dagster/row_count"], metadata["removed"], metadata["filtered"]) == (60, 0, 0)


def test_what_is_left_out_is_shown(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    export = root / "datasets" / "brain" / f"brain_dataset_{DATE}.jsonl"
    with export.open("a") as lines:
        lines.write('{"text":"write to a@b.org","quality":4}\n{"text":"one, two, Record; 4","quality":4}\n')
        lines.write('{"text":"one two record 4","quality":4}\nbad\n')
    (root / "deletions.txt").write_text("r3\n")
    metadata = materialize(
        monkeypatch,
        root,
        deletion_list=root / "deletions.txt",
        min_quality=1,
        sensitive_data="mask",
        near_duplicates="drop",
    )
    assert (metadata["removed"], metadata["filtered"], metadata["rejected"], metadata["masked"]) == (1, 12, 1, 1)
    left_out = ("removed", "filtered", "rejected", "duplicates", "near_duplicates_dropped", "blank")
    assert metadata["lines"] == metadata["dagster/row_count"] + sum(metadata[name] for name in left_out) == 64
    # One of them was dropped, or the two stand on different sides.
    assert metadata["near_duplicates_found"] + metadata["near_leaks"] == 1


@pytest.mark.parametrize(
    ("config", "dates"),
    [
        ({}, "2026-05-01, 2026-05-20, 2026-06-01"),
        ({"window": "last:2"}, "2026-05-20, 2026-06-01"),
        ({"window": "date", "eval_fraction": 0.5}, "2026-06-01"),
    ],
)
def test_window_and_share_held_out_are_chosen_for_a_run(
    monkeypatch: pytest.MonkeyPatch, root: Path, config: dict[str, Any], dates: str
) -> None:
    for date in ("2026-05-01", "2026-05-20", "2026-06-02"):
        (root / "datasets" / "brain" / f"brain_dataset_{date}.jsonl").write_text(f'{{"text":"of {date}"}}\n')
    metadata = materialize(monkeypatch, root, config)
    assert metadata["window_dates"] == dates
    assert (metadata["eval"] > 15) == ("eval_fraction" in config)
