"""Every figure of a report is followed to the exports, and a broken link is told wherever it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.errors import ArtifactError, ConfigurationError
from finetune.layout import DataLayout
from finetune.publishing import publish_directory
from finetune.reproduction.at_hand import Found, Places
from finetune.reproduction.manifest import experiment_manifest, training_entry, write_manifest
from finetune.reproduction.models import Figure, StoppedTraining
from finetune.reproduction.trace import Trace, trace
from finetune.training.identity import CODE_VERSION
from tests.finetune.reproduction.conftest import Published

CHAIN = ["evaluation", "records", "adapter", "training", "base model", "dataset", "export", "export"]


@contextmanager
def broken(file: Path, damage: Callable[[Path], object]) -> Iterator[None]:
    """A file that was damaged, for the block."""
    whole = file.read_bytes()
    damage(file)
    try:
        yield
    finally:
        file.write_bytes(whole)


def flip(file: Path) -> None:
    """One bit of a file is another one; its size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)


def told(traced: Trace) -> dict[str, str]:
    """The links that are not whole, and what is wrong with each."""
    return {
        link.kind: f"{link.state}: {link.reason}"
        for c in traced.chains.values()
        for link in c.links
        if link.state != "present"
    }


def test_every_figure_of_an_evaluation_is_followed_to_the_exports(published: Published) -> None:
    traced = trace(published.evaluation / "report.html", published.places)
    report = json.loads((published.evaluation / "report.json").read_bytes())
    numbers = {name for name, value in report.items() if isinstance(value, float)} - {"seconds"}
    assert {name for name, figure in traced.figures.items() if figure.value is not None} == numbers
    assert {"losses.png", "change.png"} <= set(traced.figures)
    assert traced.broken == []
    (chain,) = traced.chains.values()
    # The training began with the adapter of another one, which is a link too.
    assert [link.kind for link in chain.links] == [*CHAIN[:4], "adapter", *CHAIN[4:]]
    assert [link.path for link in chain.links[-2:]] == sorted(published.layout.exports.iterdir())


def test_a_figure_of_a_version_is_followed_from_its_own_copy(published: Published) -> None:
    traced = trace(published.first, published.places, figure="eval_loss")
    assert list(traced.figures) == ["eval_loss"]
    (chain,) = traced.chains.values()
    assert [link.kind for link in chain.links] == CHAIN
    assert chain.links[2].path == published.first
    with pytest.raises(ConfigurationError, match="no figure accuracy"):
        trace(published.first, published.places, figure="accuracy")


def test_a_change_of_any_link_is_told_by_its_name(published: Published) -> None:
    run_id = published.trainings[0].run_id
    manifest = published.first
    (dataset,) = {path.parent for path in (published.layout.root / "prepared").rglob("train.jsonl")}
    export = next(published.layout.exports.iterdir())
    links = {
        "evaluation": published.layout.model(run_id, "evaluation") / "losses.png",
        "records": dataset / "eval.jsonl",
        "dataset": dataset / "train.jsonl",
        "export": export,
    }
    for kind, file in links.items():
        with broken(file, flip):
            traced = trace(manifest, published.places)
        assert kind in told(traced), f"{file} was altered"
        assert told(traced)[kind].startswith("changed: ")
        assert set(traced.broken) == {"eval_loss", "base_loss"}
        with broken(file, Path.unlink):
            assert kind in told(trace(manifest, published.places)), f"{file} is gone"
    assert trace(manifest, published.places).broken == []


def test_an_altered_adapter_training_or_report_is_told(published: Published, tmp_path: Path) -> None:
    version = tmp_path / "v1"
    shutil.copytree(published.first, version)
    (version / "adapter_model.safetensors").unlink()
    shutil.copy(published.second / "adapter_model.safetensors", version / "adapter_model.safetensors")
    content = json.loads((version / "experiment_manifest.json").read_bytes())
    content["trainings"][0]["request"]["plan"]["trial_config"]["seed"] = 9
    (version / "experiment_manifest.json").write_text(json.dumps(content))
    traced = trace(version, Places(layout=published.layout, exports=published.layout.exports))
    assert traced.report.state == "changed"
    assert "training" in told(traced)
    assert set(traced.broken) == set(traced.figures)


def test_an_embedded_model_that_is_gone_is_told_and_none_is_made(published: Published, tmp_path: Path) -> None:
    root = tmp_path / "elsewhere"
    version = shutil.copytree(published.first, tmp_path / "v1")
    content = json.loads((version / "experiment_manifest.json").read_bytes())
    content["trainings"][0]["request"]["base_model"]["path"] = str(tmp_path / "embedded-0123456789ab")
    (version / "experiment_manifest.json").write_text(json.dumps(content))
    traced = trace(version, Places(layout=DataLayout(root), exports=published.layout.exports))
    assert told(traced)["base model"] == "missing: "
    assert not root.exists()


def test_a_model_of_the_hub_is_known_by_its_commit_wherever_its_cache_lies(
    published: Published, tmp_path: Path
) -> None:
    version = shutil.copytree(published.first, tmp_path / "v1")
    content = json.loads((version / "experiment_manifest.json").read_bytes())
    content["trainings"][0]["request"]["base_model"] |= {
        "name": "org/model",
        "path": str(tmp_path / "snapshots" / "c0ffee"),
        "revision": "c0ffee",
        "fingerprint": "c0ffee",
        "embedded": False,
    }
    (version / "experiment_manifest.json").write_text(json.dumps(content))
    places = Places(layout=DataLayout(tmp_path / "elsewhere"), exports=published.layout.exports)
    assert told(trace(version, places))["base model"] == "missing: "
    cached = places.layout.base_models / "hub" / "models--org--model" / "snapshots" / "c0ffee"
    cached.mkdir(parents=True)
    assert told(trace(version, places))["base model"] == "changed: it is not whole"
    (cached / "config.json").write_text("{}")
    assert "base model" not in told(trace(version, places))


def test_a_figure_of_which_nobody_says_what_it_was_computed_from_is_not_followed() -> None:
    report = Found(kind="report", name="experiment", expected="0", state="present")
    traced = Trace(report=report, figures={"mean": Figure(value=1.0, runs=[])}, chains={})
    assert traced.broken == ["mean"]


def test_a_directory_that_says_nothing_of_its_figures_is_no_report(published: Published, tmp_path: Path) -> None:
    for directory in (tmp_path, published.layout.adapter(published.trainings[0].run_id)):
        with pytest.raises(ArtifactError, match="no report that says what its figures were made from"):
            trace(directory, published.places)
    with publish_directory(tmp_path / "report", kind="experiment") as staging:
        (staging.path / "report.html").write_text("<html>")
    with pytest.raises(ArtifactError, match="no report that says"):
        trace(tmp_path / "report", published.places)


def test_a_figure_of_a_training_that_was_stopped_early_is_followed_to_what_it_was_trained_on(
    published: Published, tmp_path: Path
) -> None:
    entry = training_entry(published.trainings[0].adapter_path or Path(), [])
    assert entry is not None
    request = entry.request
    stopped = StoppedTraining(request=request, reason="it was no better than others", code_version=CODE_VERSION)
    manifest = experiment_manifest(
        kind="hpo_study",
        name="stopped",
        configuration={},
        seed=None,
        trainings={},
        exports=published.layout.exports,
        environment={},
        secrets=[],
        figures={"trial.0.seconds": Figure(value=1.5, runs=[request.run_id])},
        stopped=[stopped],
    )
    with publish_directory(tmp_path / "report", kind="experiment") as staging:
        write_manifest(staging.path, manifest)
    traced = trace(tmp_path / "report", published.places)
    assert traced.broken == []
    (chain,) = traced.chains.values()
    assert [link.kind for link in chain.links] == CHAIN[3:]
    with broken(request.dataset.path / "train.jsonl", flip):
        assert trace(tmp_path / "report", published.places).broken == ["trial.0.seconds"]
    other = stopped.model_copy(update={"request": request.model_copy(update={"run_id": "20260601-0000000000"})})
    figures = {"trial.0.seconds": Figure(value=1.5, runs=[other.run_id])}
    with publish_directory(tmp_path / "report", kind="experiment", replace=True) as staging:
        write_manifest(staging.path, manifest.model_copy(update={"stopped": [other], "figures": figures}))
    assert "training" in told(trace(tmp_path / "report", published.places))
