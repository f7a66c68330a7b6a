"""New records and a replay of those that are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from finetune.dataset.models import PreparedDataset
from finetune.dataset.replay import known_lines, new_and_replayed
from finetune.errors import ArtifactError
from finetune.layout import DataLayout

Prepare = Callable[..., PreparedDataset]
Pairs = Callable[..., bytes]
OLD, NEW = "brain_dataset_2026-06-01.jsonl", "brain_dataset_2026-06-02.jsonl"


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


@pytest.fixture
def two(prepare: Prepare, pairs: Pairs) -> tuple[PreparedDataset, PreparedDataset]:
    """The datasets of two dates; the second holds the first, and repeats some of its records."""
    old, new = pairs(*range(100)), pairs(*range(90, 160))
    return prepare({OLD: old}), prepare({OLD: old, NEW: new})


def test_all_that_is_new_and_the_share_asked_for_of_what_is_known_in_their_order(
    two: tuple[PreparedDataset, PreparedDataset], layout: DataLayout
) -> None:
    known, dataset = two
    before, whole = set(lines_of(known.train_path)), lines_of(dataset.train_path)
    new = [line for line in whole if line not in before]
    found = new_and_replayed(dataset, known, fraction=0.25, layout=layout)
    assert found is not None
    chosen = lines_of(found.dataset.train_path)
    assert [line for line in chosen if line not in before] == new
    assert [line for line in whole if line in set(chosen)] == chosen
    assert (found.new, found.replayed, found.earlier) == (len(new), round(len(new) / 3), len(before))
    assert len(chosen) == found.dataset.counts.train == found.new + found.replayed
    assert found.dataset.records_by_file == {OLD: found.replayed, NEW: found.new}
    # What is held out stays held out, of old and new data alike.
    assert found.dataset.eval_path.read_bytes() == dataset.eval_path.read_bytes()
    assert not set(chosen) & set(lines_of(dataset.eval_path))


def test_an_equal_question_has_an_equal_answer_and_a_larger_share_holds_the_smaller(
    two: tuple[PreparedDataset, PreparedDataset], layout: DataLayout, tmp_path: Path
) -> None:
    known, dataset = two

    def sample(fraction: float, where: DataLayout = layout, of: PreparedDataset = dataset) -> set[bytes]:
        found = new_and_replayed(of, known, fraction=fraction, layout=where)
        assert found is not None
        return set(lines_of(found.dataset.train_path))

    assert sample(0.25) == sample(0.25, DataLayout(tmp_path / "elsewhere"))
    assert sample(0.0) < sample(0.1) < sample(0.25) < sample(0.9) == set(lines_of(dataset.train_path))
    # Another date remembers other records.
    assert sample(0.25, of=dataset.model_copy(update={"date": "2026-06-03"})) != sample(0.25)


def test_without_replay_only_what_is_new_is_trained_on(
    two: tuple[PreparedDataset, PreparedDataset], layout: DataLayout
) -> None:
    known, dataset = two
    found = new_and_replayed(dataset, known, fraction=0.0, layout=layout)
    assert found is not None
    assert found.replayed == 0
    assert not set(lines_of(found.dataset.train_path)) & set(lines_of(known.train_path))


def test_where_nothing_is_new_there_is_nothing_to_go_on_with(
    two: tuple[PreparedDataset, PreparedDataset], layout: DataLayout
) -> None:
    _, dataset = two
    assert new_and_replayed(dataset, dataset, fraction=0.25, layout=layout) is None


def test_held_out_records_are_old_where_the_earlier_dataset_held_them_out_too(
    two: tuple[PreparedDataset, PreparedDataset],
) -> None:
    known, dataset = two
    old = known_lines(dataset.eval_path, known.eval_path)
    assert old.sum() == len(lines_of(known.eval_path))
    assert 0 < old.sum() < len(old) == dataset.counts.eval


def test_a_record_that_comes_back_with_another_id_is_not_new(prepare: Prepare, layout: DataLayout) -> None:
    def export(night: int, count: int) -> bytes:
        rows = ({"id": f"{night}-{i}", "prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(count))
        return b"".join(orjson.dumps(row) + b"\n" for row in rows)

    window = {"parameters": {"window": "date"}}
    known, dataset = prepare({OLD: export(1, 60)}, **window), prepare({NEW: export(2, 80)}, **window)
    assert not set(lines_of(dataset.train_path)) & set(lines_of(known.train_path))
    found = new_and_replayed(dataset, known, fraction=0.5, layout=layout)
    assert found is not None
    assert (found.new, found.earlier) == (dataset.counts.train - known.counts.train, known.counts.train)
    assert known_lines(dataset.eval_path, known.eval_path).sum() == known.counts.eval


def test_a_line_that_is_no_record_is_named(two: tuple[PreparedDataset, PreparedDataset]) -> None:
    known, dataset = two
    with dataset.eval_path.open("ab") as lines:
        lines.write(b"{}\n")
    with pytest.raises(ArtifactError, match=f"line {dataset.counts.eval + 1} of a published dataset is no record"):
        known_lines(dataset.eval_path, known.eval_path)
