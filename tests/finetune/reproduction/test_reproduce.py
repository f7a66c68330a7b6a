"""Trainings that are run again from their manifest alone, and what keeps that from passing for more than it is."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.adapter_files import WEIGHTS_NAME
from finetune.base_model.models import BaseModelRef
from finetune.dataset.deletions import content_hash, read_deletions
from finetune.errors import ArtifactError, ConfigurationError
from finetune.layout import DataLayout
from finetune.progress import ProgressEvent, ignore_progress
from finetune.publishing import read_manifest
from finetune.reproduction.at_hand import Places, first_that_fits, look_for_inputs
from finetune.reproduction.check import Checked, Selection, check, select
from finetune.reproduction.compare import compare
from finetune.reproduction.manifest import read_experiment_manifest
from finetune.reproduction.models import EXPERIMENT_MANIFEST
from finetune.reproduction.reproduce import Reproduced, reproduce
from tests.finetune.reproduction.conftest import Published


def checked(path: Path, places: Places, *chosen: str) -> Checked:
    selection = select(path, chosen)
    return check(
        selection, look_for_inputs(selection.manifest.inputs, places, weights=True, on_progress=ignore_progress), places
    )


def run(path: Path, places: Places, output: Path, on_progress: Any = ignore_progress, *chosen: str) -> Reproduced:
    selection: Selection = select(path, chosen)
    at_hand = look_for_inputs(selection.manifest.inputs, places, weights=True, on_progress=ignore_progress)
    judged = check(selection, at_hand, places)
    assert judged.refusals == []
    return reproduce(
        selection,
        at_hand,
        places,
        output=output,
        tolerance=0.01,
        not_prepared=judged.not_prepared,
        on_progress=on_progress,
    )


def contents(directory: Path) -> dict[str, tuple[int, float, bytes]]:
    """Every file of a directory, its inode, time and bytes."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(p): (p.stat().st_ino, p.stat().st_mtime, p.read_bytes()) for p in files}


def copied(published: Published, tmp_path: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A version's manifest at a place of its own, changed."""
    content = json.loads((published.first / EXPERIMENT_MANIFEST).read_bytes())
    if change:
        change(content)
    path = tmp_path / "copied" / EXPERIMENT_MANIFEST
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    return path


def test_a_version_comes_out_again_to_the_bit_from_its_exports_and_nothing_published_is_touched(
    published: Published, tmp_path: Path
) -> None:
    before = contents(published.layout.root)
    told: list[ProgressEvent] = []
    reproduced = run(published.first, published.places, tmp_path / "again", told.append)
    (training,) = reproduced.trainings
    assert reproduced.equal, (reproduced.datasets, training.reason)
    assert (training.verdict, training.must_be_identical) == ("bit-identical", True)
    assert training.reproduced_hash == published.trainings[0].adapter_hash
    assert any(event.stage == "training" for event in told), "otherwise nothing was trained"
    weights = tmp_path / "again" / "adapters" / "brain" / training.run_id / WEIGHTS_NAME
    assert weights.stat().st_nlink == 1
    assert weights.read_bytes() == (published.first / WEIGHTS_NAME).read_bytes()
    (dataset,) = reproduced.datasets
    assert dataset.equal
    assert set(training.metrics) >= {"eval_loss", "base_loss", "eval_perplexity"}
    assert all(once == again for once, again in training.metrics.values())
    assert contents(published.layout.root) == before
    # What is done is not done again: it only tells.
    told.clear()
    assert run(published.first, published.places, tmp_path / "again", told.append).trainings == reproduced.trainings
    assert not any(event.stage == "training" for event in told)


def test_a_training_that_began_with_an_adapter_begins_with_it_again(published: Published, tmp_path: Path) -> None:
    reproduced = run(published.second, published.places, tmp_path / "again")
    (training,) = reproduced.trainings
    assert training.verdict == "bit-identical"
    manifest = read_experiment_manifest(published.second)
    start = manifest.trainings[0].request.init_adapter
    assert start is not None
    assert [adapter.adapter_hash for adapter in manifest.inputs.adapters] == [start.adapter_hash]
    assert start.adapter_hash == published.trainings[0].adapter_hash


def test_a_chain_of_trainings_is_made_in_its_order_each_from_the_one_before(
    published: Published, tmp_path: Path
) -> None:
    first, second = (
        json.loads((path / EXPERIMENT_MANIFEST).read_bytes()) for path in (published.first, published.second)
    )
    path = tmp_path / EXPERIMENT_MANIFEST
    second["trainings"] += first["trainings"]
    path.write_text(json.dumps(second))
    # The adapter that the second began with is gone: it is made again.
    gone = published.layout.adapter(published.trainings[0].run_id)
    hidden = gone.rename(tmp_path / "hidden")
    try:
        assert checked(path, published.places).refusals == []
        alone = checked(path, published.places, published.trainings[1].run_id)
        assert any("adapter" in refusal and "missing" in refusal for refusal in alone.refusals)
        reproduced = run(path, published.places, tmp_path / "again")
    finally:
        hidden.rename(gone)
    assert [each.run_id for each in reproduced.trainings] == [result.run_id for result in published.trainings]
    assert [each.verdict for each in reproduced.trainings] == ["bit-identical", "bit-identical"]


def test_another_seed_gives_another_adapter_and_is_told_as_different(published: Published, tmp_path: Path) -> None:
    def reseed(content: dict[str, Any]) -> None:
        content["trainings"][0]["request"]["plan"]["trial_config"]["seed"] = 9

    reproduced = run(copied(published, tmp_path, reseed), published.places, tmp_path / "again")
    (training,) = reproduced.trainings
    assert not reproduced.equal
    assert training.verdict == "different"
    assert training.largest_weight_difference is not None
    assert training.largest_weight_difference > 0.01
    assert "same bits were to come out" in training.reason


def test_an_export_that_has_changed_is_refused_by_its_name_and_one_that_is_gone_is_done_without(
    published: Published, tmp_path: Path
) -> None:
    exports = tmp_path / "exports"
    shutil.copytree(published.layout.exports, exports)

    def moved(content: dict[str, Any]) -> None:
        for file in content["inputs"]["exports"]:
            file["directory"] = str(exports)

    path = copied(published, tmp_path, moved)
    elsewhere = Places(layout=published.layout, exports=tmp_path / "nowhere")
    assert checked(path, elsewhere).refusals == []
    name = "brain_dataset_2026-06-01.jsonl"
    with (exports / name).open("a") as stream:
        stream.write("\n")
    (refusal,) = checked(path, elsewhere).refusals
    assert name in refusal
    assert "has changed" in refusal
    assert "bytes instead of" in refusal
    (exports / name).unlink()
    judged = checked(path, elsewhere)
    assert judged.refusals == []
    assert list(judged.not_prepared.values()) == ["1 of its 2 exports are not at hand"]
    (found,) = [each for each in judged.inputs if each.name == name]
    assert found.state == "missing"
    assert found.looked_at == [exports / name, tmp_path / "nowhere" / name]


def test_a_dataset_that_is_gone_is_prepared_again_and_one_without_its_exports_is_refused(
    published: Published, tmp_path: Path
) -> None:
    def moved(content: dict[str, Any]) -> None:
        content["inputs"]["datasets"][0]["path"] = str(tmp_path / "gone")

    path = copied(published, tmp_path, moved)
    empty = DataLayout(tmp_path / "empty")
    assert checked(path, Places(layout=empty, exports=published.layout.exports)).refusals == []
    (first, *_) = [file.name for file in sorted(published.layout.exports.iterdir())]
    hidden = (published.layout.exports / first).rename(tmp_path / first)
    try:
        refusals = checked(path, Places(layout=empty, exports=published.layout.exports)).refusals
    finally:
        hidden.rename(published.layout.exports / first)
    assert len(refusals) == 1
    assert "dataset 2026-06-08 is missing" in refusals[0]
    assert str(tmp_path / "gone") in refusals[0]


def test_what_is_on_the_deletion_list_is_not_learned_again(published: Published, tmp_path: Path) -> None:
    (train,) = (published.layout.root / "prepared").rglob("train.jsonl")
    entry = f"content:{content_hash(json.loads(train.read_bytes().splitlines()[0]))}"
    (tmp_path / "listed").write_text(entry)
    listed = replace(published.places, deletions=read_deletions(tmp_path / "listed"))
    (refusal,) = checked(published.first, listed).refusals
    assert "what is on the deletion list here" in refusal

    def moved(content: dict[str, Any]) -> None:
        content["inputs"]["datasets"][0]["path"] = str(tmp_path / "gone")

    # Nor is it prepared again with it.
    elsewhere = replace(listed, layout=DataLayout(tmp_path / "empty"))
    (refusal,) = checked(copied(published, tmp_path, moved), elsewhere).refusals
    assert "what is on the deletion list here" in refusal
    (tmp_path / "listed").write_text("of-nobody")
    unnamed = replace(published.places, deletions=read_deletions(tmp_path / "listed"))
    assert checked(published.first, unnamed).refusals == []


def test_what_lay_where_nobody_may_look_here_is_looked_for_where_it_would_lie(tmp_path: Path) -> None:
    def unreadable(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # Longer than any name that a file system has: it cannot even be asked for.
    nowhere = tmp_path / ("n" * 300)
    assert first_that_fits([nowhere, tmp_path], lambda path: "") == ("present", tmp_path, "")
    assert first_that_fits([nowhere], lambda path: "") == ("missing", None, "")
    state, _, reason = first_that_fits([tmp_path], unreadable)
    assert (state, reason) == ("changed", "it cannot be read: Permission denied")


def test_an_embedded_model_of_another_recipe_is_taken_as_it_lies(
    published: Published, tmp_path: Path, tiny_model: BaseModelRef
) -> None:
    older = shutil.copytree(tiny_model.path, tmp_path / "embedded-0123456789ab")

    def moved(content: dict[str, Any]) -> None:
        content["inputs"]["base_models"][0]["path"] = str(older)

    (found,) = [
        each
        for each in checked(copied(published, tmp_path, moved), published.places).inputs
        if each.kind == "base model"
    ]
    assert (found.state, found.path) == ("present", older)


def test_another_base_model_in_the_same_place_is_refused(
    published: Published, tmp_path: Path, tiny_model: BaseModelRef
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model.path, model)
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 123.0}))

    def moved(content: dict[str, Any]) -> None:
        for named in (content["inputs"]["base_models"][0], content["trainings"][0]["request"]["base_model"]):
            named |= {"name": str(model), "path": str(model), "embedded": False}

    (refusal,) = checked(copied(published, tmp_path, moved), published.places).refusals
    assert str(model) in refusal
    assert "fingerprint" in refusal
    shutil.rmtree(model)
    shutil.rmtree(tmp_path / "copied")
    (refusal,) = checked(copied(published, tmp_path, moved), published.places).refusals
    assert "is missing" in refusal


def test_another_version_of_a_library_is_told_and_bits_need_not_be_equal_then(
    published: Published, tmp_path: Path
) -> None:
    def older(content: dict[str, Any]) -> None:
        then = content["trainings"][0]["provenance"]
        then["libraries"]["torch"] = "2.0.0"
        then["libraries"]["dagster"] = "1.0"
        then["hardware"]["cpu_model"] = "Another CPU"

    found = {each.what: each for each in checked(copied(published, tmp_path, older), published.places).differences}
    assert found["torch"].recorded == "2.0.0"
    assert found["torch"].decides
    assert found["CPU"].decides
    assert not found["dagster"].decides
    # As it is here, nothing differs.
    assert [each.what for each in checked(published.first, published.places).differences if each.decides] == []


def test_near_weights_are_within_the_tolerance_only_where_bits_need_not_be_equal(
    published: Published, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    (entry,) = read_experiment_manifest(published.first).trainings
    near = tmp_path / "near"
    shutil.copytree(published.first, near)
    weights = load_file(near / WEIGHTS_NAME)
    save_file({name: tensor + 0.001 for name, tensor in weights.items()}, near / WEIGHTS_NAME)

    def judged(tolerance: float, *, must: bool, metrics: dict[str, tuple[float, float]] | None = None) -> str:
        return compare(
            entry,
            near,
            metrics or {},
            published=[published.first],
            tolerance=tolerance,
            must_be_identical=must,
        ).verdict

    assert judged(0.01, must=False) == "within tolerance"
    assert judged(0.0001, must=False) == "different"
    assert judged(0.01, must=True) == "different"
    assert judged(0.01, must=False, metrics={"eval_loss": (2.0, 2.5)}) == "different"
    assert judged(0.01, must=False, metrics={"eval_loss": (2.0, math.nan)}) == "different"
    save_file({name: tensor * math.nan for name, tensor in weights.items()}, near / WEIGHTS_NAME)
    assert judged(1e9, must=False) == "different"
    save_file({name: tensor[:1] for name, tensor in weights.items()}, near / WEIGHTS_NAME)
    assert judged(1e9, must=False) == "different"
    # Without the published adapter and without metrics nothing tells that another hash is near.
    alone = compare(entry, near, {}, published=[], tolerance=1e9, must_be_identical=False)
    assert (alone.verdict, alone.largest_weight_difference) == ("different", None)
    told = compare(
        entry,
        published.first,
        {},
        published=[],
        tolerance=0.01,
        must_be_identical=True,
        not_evaluated=["evaluation"],
    )
    assert "not evaluated again, for its records are not at hand: evaluation" in told.reason


def test_a_reproduction_takes_no_place_that_holds_something_else(published: Published, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="files that are no reproduction lie here"):
        run(published.first, published.places, published.layout.root)
    output = tmp_path / "again"
    output.mkdir()
    (output / "reproduction.json").write_text('{"manifest_sha256": "of another"}')
    with pytest.raises(ConfigurationError, match="reproduction of another manifest"):
        run(published.first, published.places, output)
    with pytest.raises(ConfigurationError, match="within a published directory"):
        run(published.first, published.places, published.first / "again")


def test_a_manifest_that_cannot_be_run_says_why(published: Published, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no training 20260101-0"):
        select(published.first, ["20260101-0"])

    def remote(content: dict[str, Any]) -> None:
        content["trainings"][0]["result"]["backend"] = "h2o"

    (refusal,) = checked(copied(published, tmp_path, remote), published.places).refusals
    assert "ran elsewhere (h2o)" in refusal
    shutil.rmtree(tmp_path / "copied")

    def without_inputs(content: dict[str, Any]) -> None:
        content["inputs"].update(datasets=[], base_models=[])

    refusals = checked(copied(published, tmp_path, without_inputs), published.places).refusals
    assert [refusal.split(" of training")[0] for refusal in refusals] == [
        "the manifest does not tell of the dataset",
        "the manifest does not tell of the base model",
    ]
    shutil.rmtree(tmp_path / "copied")

    def circular(content: dict[str, Any]) -> None:
        run_id = content["run_id"]
        start = {"path": "/nowhere", "run_id": run_id, "adapter_hash": "0"}
        content["trainings"][0]["request"]["init_adapter"] = start

    with pytest.raises(ArtifactError, match="begin with each other's adapters"):
        select(copied(published, tmp_path, circular))
    shutil.rmtree(tmp_path / "copied")
    with pytest.raises(ConfigurationError, match="tells of no training"):
        select(copied(published, tmp_path, lambda content: content.update(trainings=[])))


def test_memory_that_ran_out_is_taken_as_run_out_again(published: Published, tmp_path: Path) -> None:
    def halved(content: dict[str, Any]) -> None:
        content["trainings"][0]["result"]["out_of_memory"] = [2]

    reproduced = run(copied(published, tmp_path, halved), published.places, tmp_path / "again")
    (training,) = reproduced.trainings
    assert read_manifest(training.adapter).results["micro_batch"] == 1
