"""``experiment_manifest.json``: what it says is true, and it says it in a form that is written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from finetune.errors import ArtifactError
from finetune.publishing import sha256_file
from finetune.registry.store import get_version
from finetune.reproduction import models
from finetune.reproduction.manifest import experiment_manifest, read_experiment_manifest, write_manifest
from finetune.reproduction.models import EXPERIMENT_MANIFEST, Figure, VersionManifest, manifest_schema
from finetune.reproduction.provenance import describe_process
from tests.finetune.reproduction.conftest import DATE, Published

SCHEMA = Path(models.__file__).with_name("experiment_manifest.schema.json")


def content_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / EXPERIMENT_MANIFEST).read_bytes())
    return content


def paths_and_hashes(content: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """Every file that the manifest names a SHA-256 of."""
    for file in content["inputs"]["exports"]:
        yield Path(file["directory"]) / file["name"], file["sha256"]
    for dataset in content["inputs"]["datasets"]:
        yield from ((Path(dataset["path"]) / name, entry["sha256"]) for name, entry in dataset["files"].items())
    for training in content["trainings"]:
        adapter = Path(training["result"]["adapter_path"])
        yield from ((adapter / name, entry["sha256"]) for name, entry in training["outputs"].items())
        for evaluation in training["evaluations"]:
            yield Path(evaluation["path"]) / "report.json", evaluation["sha256"]
            yield Path(evaluation["dataset"]), evaluation["dataset_sha256"]


def test_a_versions_manifest_names_every_input_and_output_with_its_hash(published: Published) -> None:
    content = content_of(published.first)
    named = dict(paths_and_hashes(content))
    assert len(named) > 8
    assert {path: sha256_file(path) for path in named} == named
    assert [file["date"] for file in content["inputs"]["exports"]] == ["2026-06-01", DATE]
    assert {name: sha256_file(published.first / name) for name in content["outputs"]} == {
        name: entry["sha256"] for name, entry in content["outputs"].items()
    }
    (dataset,) = content["inputs"]["datasets"]
    assert dataset["parameters"]["eval_fraction"] == 0.3
    (training,) = content["trainings"]
    assert content["seeds"] == {training["request"]["run_id"]: 7}
    assert training["request"]["plan"]["trial_config"]["max_steps"] == 6
    assert training["evaluations"][0]["metrics"]["eval_loss"] == content["metrics"]["eval_loss"]
    assert content["environment"] == {"SEED": "7"}


def test_a_training_keeps_under_what_it_ran(published: Published) -> None:
    (training,) = content_of(published.first)["trainings"]
    ran = training["provenance"]
    assert ran["libraries"]["torch"] == version("torch")
    assert ran["threads"] == 1
    assert ran["hardware"]["cpus"] == os.cpu_count()
    assert ran["hardware"]["cpu_model"]
    assert ran["hardware"]["memory_bytes"] > 1 << 28
    assert ran["command"]
    commit = subprocess.run(
        ["git", "-C", str(SCHEMA.parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if commit.returncode == 0:
        assert len(ran["git_commit"]) == 40
        assert ran["git_dirty"] in (True, False)


def test_where_there_is_no_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    process = describe_process()
    assert (process.git_commit, process.git_dirty) == (None, None)
    assert process.hardware.gpus == []


def test_gpus_are_named_with_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'NVIDIA L4, 550.54.15\\nNVIDIA L4, 550.54.15\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    hardware = describe_process().hardware
    assert hardware.gpus == ["NVIDIA L4", "NVIDIA L4"]
    assert hardware.gpu_driver == "550.54.15"


def experiment_of(published: Published, directory: Path, secret: str = "none") -> Path:
    """An experiment's manifest, of both trainings."""
    evaluations = [published.layout.model(training.run_id, "evaluation") for training in published.trainings]
    adapters = [published.layout.adapter(training.run_id) for training in published.trainings]
    runs = [training.run_id for training in published.trainings]
    manifest = experiment_manifest(
        kind="ablation_report",
        name="ablation-1",
        configuration={"goal": f"to beat https://me:{secret}@host/x", "seeds": 2},
        seed=3,
        trainings={adapter: [report] for adapter, report in zip(adapters, evaluations, strict=True)},
        exports=published.layout.exports,
        environment={"BASE_MODEL_NAME": f"https://me:{secret}@host/model"},
        secrets=[secret],
        figures={"mean": Figure(value=2.5, runs=runs)},
    )
    directory.mkdir()
    (directory / "curve.png").write_bytes(b"a picture")
    write_manifest(directory, manifest)
    return directory


def test_the_schema_that_is_kept_is_that_of_the_code() -> None:
    code = "from finetune.reproduction.models import manifest_schema; print(manifest_schema(), end='')"
    update = f'{sys.executable} -c "{code}" > {SCHEMA}'
    assert SCHEMA.read_text() == manifest_schema(), f"make it anew: {update}"


def test_real_manifests_are_valid_and_what_lacks_a_hash_is_not(published: Published, tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_bytes())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    version_manifest, experiment = content_of(published.second), content_of(experiment_of(published, tmp_path / "e"))
    assert [error.message for each in (version_manifest, experiment) for error in validator.iter_errors(each)] == []
    del experiment["inputs"]["exports"][0]["sha256"]
    assert not validator.is_valid(experiment)
    del version_manifest["seeds"]
    assert not validator.is_valid(version_manifest)
    assert not validator.is_valid({**content_of(published.first), "kind": "another"})


def test_an_experiments_manifest_holds_no_secret_and_its_pictures_are_of_all_trainings(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "open-sesame-31"
    monkeypatch.setattr(sys, "argv", ["prog", "--passwd", "pw", f"--url=https://me:{secret}@host/", secret])
    directory = experiment_of(published, tmp_path / "e", secret)
    assert secret not in (directory / EXPERIMENT_MANIFEST).read_text()
    manifest = read_experiment_manifest(directory)
    assert manifest.command == ["prog", "--passwd", "***", "--url=https://***@host/", "***"]
    assert manifest.seeds["ablation-1"] == 3
    assert manifest.metrics == {"mean": 2.5}
    assert not isinstance(manifest, VersionManifest)
    assert manifest.figures["curve.png"].runs == [training.run_id for training in published.trainings]
    assert manifest.outputs["curve.png"].size == len(b"a picture")


def test_versions_that_were_registered_before_are_still_read(published: Published, tmp_path: Path) -> None:
    content = content_of(published.first)
    old = {
        name: content[name]
        for name in ("version", "created_at", "adapter_hash", "run_id", "trial_id", "adapter_config", "metrics", "tags")
    }
    old |= {name: content[name] for name in ("libraries", "python", "platform", "git_commit", "command", "outputs")}
    machine = {"machine": "x86_64", "cpus": 2, "memory_bytes": 1, "gpus": []}
    old |= {"schema_version": 1, "inputs": {"dataset_fingerprint": "f"}, "hardware": machine}
    registry = tmp_path / "registry"
    (registry / "v1").mkdir(parents=True)
    (registry / "v1" / EXPERIMENT_MANIFEST).write_text(json.dumps(old))
    (registry / "v1" / "manifest.json").write_text("{}")
    assert get_version(registry, "v1").lineage == {"dataset_fingerprint": "f"}
    assert read_experiment_manifest(registry / "v1").trainings == []


def test_a_manifest_of_a_later_version_or_a_damaged_one_is_refused(published: Published, tmp_path: Path) -> None:
    path = tmp_path / EXPERIMENT_MANIFEST
    with pytest.raises(ArtifactError, match="no experiment manifest can be read here"):
        read_experiment_manifest(path)
    path.write_text(json.dumps({**content_of(published.first), "schema_version": 99}))
    with pytest.raises(ArtifactError, match="schema version 99"):
        read_experiment_manifest(tmp_path)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="unreadable"):
        read_experiment_manifest(path)
