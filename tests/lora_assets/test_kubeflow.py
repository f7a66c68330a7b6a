"""`lora-assets trainjob`, checked by Kubeflow Trainer's own models of its resources."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import typer.main
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from pydantic import ValidationError
from typer.testing import CliRunner

from lora_assets.cli.app import app

OPTIONS = ["--base-model", "/data/m", "--dataset", "/data/t.jsonl", "--output", "/data/a", "--plan", "/data/p.json"]


def manifest(*options: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["trainjob", "--name", "brain", "--image", "acme/train:1", *OPTIONS, *options])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


def kept(job: dict[str, Any]) -> Any:
    """What of a manifest is a field of Kubeflow's, all the way down."""
    read = TrainerV1alpha1TrainJob.from_dict(job)
    assert read is not None
    return read.to_dict()


def test_every_field_of_the_manifest_is_one_of_kubeflow_s() -> None:
    job = manifest("--nodes", "3", "--gpus", "8", "--sharding", "fsdp", "--variable", "HF_HUB_OFFLINE=1")
    assert kept(job) == job
    trainer = job["spec"]["trainer"]
    assert trainer["numNodes"] == 3
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"
    variables = {each["name"]: each["value"] for each in trainer["env"]}
    assert variables == {"DATA_ROOT": "/data", "TRAIN_SHARDING": "fsdp", "HF_HUB_OFFLINE": "1"}


def test_a_manifest_with_a_field_that_is_misspelt_or_of_another_type_does_not_pass() -> None:
    job = manifest()
    misspelt = copy.deepcopy(job)
    misspelt["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJob"] = []
    assert kept(misspelt) != misspelt
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValidationError, match="numNodes"):
        kept(job)


def test_pods_run_a_command_that_there_is() -> None:
    program, name, *arguments = manifest()["spec"]["trainer"]["command"]
    assert (program, name, arguments) == ("lora-assets", "train", OPTIONS)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]  # a group, typed as any command
    known = {option for parameter in command.params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_a_training_on_cpus_asks_for_no_gpu() -> None:
    assert "nvidia.com/gpu" not in str(manifest("--gpus", "0")["spec"]["trainer"]["resourcesPerNode"])


def test_a_name_that_kubernetes_would_refuse_is_refused() -> None:
    for name in ("Brain", "-brain", "1brain", "b" * 41):
        done = CliRunner().invoke(app, ["trainjob", f"--name={name}", "--image", "i", *OPTIONS])
        assert done.exit_code == 1
        assert "no name for a TrainJob" in done.output
