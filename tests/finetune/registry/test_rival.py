"""What the reigning champion knows of the prompts that a dataset holds out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import PreparedDataset
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.prepare import prepare_dataset
from finetune.errors import DatasetError
from finetune.evaluation.models import ChampionRef
from finetune.layout import DataLayout
from finetune.registry.champion import rival_on
from finetune.registry.models import RegisteredVersion
from finetune.registry.promotion import promote

OLD, NEW = "2026-06-01", "2026-06-02"
MakeChampion = Callable[..., RegisteredVersion]


@pytest.fixture
def layout(tmp_path: Path) -> DataLayout:
    layout = DataLayout(tmp_path / "root")
    layout.exports.mkdir(parents=True)
    for day in (OLD, NEW):
        rows = ({"prompt": f"What is {day} {i}?", "completion": f"It is {i}."} for i in range(60))
        (layout.exports / f"brain_dataset_{day}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return layout


@pytest.fixture
def make_champion(
    layout: DataLayout, make_adapter: Callable[..., Path], register: Callable[..., RegisteredVersion]
) -> MakeChampion:
    def make(dataset: PreparedDataset, **lineage: Any) -> RegisteredVersion:
        known = {"date": dataset.date, "dataset_fingerprint": dataset.fingerprint, "base_model_fingerprint": "b"}
        adapter = make_adapter(layout.adapter(f"run-{dataset.fingerprint[:8]}"), seed=len(lineage))
        version = register(layout.registry, adapter, lineage=known | lineage)
        return promote(layout.registry, version.version, reason="better", by="test")

    return make


def prepared(layout: DataLayout, date: str, **parameters: Any) -> PreparedDataset:
    """A date's dataset; the second date holds the first."""
    files = discover_exports(layout.exports)
    return prepare_dataset(files, date=date, layout=layout, parameters=PrepareParameters(**parameters))


def prompts(path: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in path.read_text().splitlines()}


def rival(layout: DataLayout, dataset: PreparedDataset) -> ChampionRef:
    found = rival_on(dataset, layout)
    assert found is not None
    return found


@pytest.mark.parametrize("now", [{"eval_fraction": 0.5}, {"eval_fraction": 0.2, "salt": "other"}], ids=str)
def test_held_out_prompts_that_the_champion_was_trained_on_are_found(
    now: dict[str, Any], layout: DataLayout, make_champion: MakeChampion
) -> None:
    trained = prepared(layout, OLD, eval_fraction=0.2)
    version = make_champion(trained)
    dataset = prepared(layout, NEW, **now)
    leaked = prompts(trained.train_path) & prompts(dataset.eval_path)
    assert leaked
    assert leaked != prompts(dataset.eval_path)
    found = rival(layout, dataset)
    assert set(found.learned) == leaked
    assert (found.version, found.adapter_hash, found.unknown) == ("v1", version.adapter_hash, [])


def test_what_a_version_learned_from_which_the_champion_went_on_is_found(
    layout: DataLayout, make_champion: MakeChampion
) -> None:
    trained = prepared(layout, OLD, eval_fraction=0.2)
    first = make_champion(trained)
    # The champion's own dataset held out all that is held out now.
    make_champion(prepared(layout, OLD, eval_fraction=0.6), continued={"version": first.version})
    dataset = prepared(layout, NEW, eval_fraction=0.5)
    found = rival(layout, dataset)
    assert found.version == "v2"
    assert set(found.learned) == prompts(trained.train_path) & prompts(dataset.eval_path) != set()


def test_no_record_is_read_where_as_much_was_held_out(layout: DataLayout, make_champion: MakeChampion) -> None:
    trained = prepared(layout, OLD, eval_fraction=0.2)
    make_champion(trained)
    # Of the same size, as the manifest says, but no JSON: whoever reads it finds out.
    trained.train_path.write_bytes(
        b"\n".join(b"?" * len(line) for line in trained.train_path.read_bytes().split(b"\n"))
    )
    with pytest.raises(DatasetError, match="line 1 is not a record"):
        rival_on(prepared(layout, NEW, eval_fraction=0.5), layout)
    for same_or_less in (0.2, 0.1):
        found = rival(layout, prepared(layout, NEW, eval_fraction=same_or_less))
        assert (found.learned, found.unknown) == ([], [])


def test_of_a_dataset_that_is_gone_or_damaged_nobody_can_tell(layout: DataLayout, make_champion: MakeChampion) -> None:
    trained = prepared(layout, OLD, eval_fraction=0.2)
    make_champion(trained)
    dataset = prepared(layout, NEW, eval_fraction=0.5)
    whole = rival(layout, dataset)
    trained.train_path.write_bytes(trained.train_path.read_bytes()[:-1])
    damaged = rival(layout, dataset)
    shutil.rmtree(trained.path)
    for found in (damaged, rival(layout, dataset)):
        assert (found.learned, found.unknown) == ([], ["v1"])
        assert found.fingerprint != whole.fingerprint


def test_before_the_first_promotion_there_is_no_rival(layout: DataLayout) -> None:
    assert rival_on(prepared(layout, OLD), layout) is None
