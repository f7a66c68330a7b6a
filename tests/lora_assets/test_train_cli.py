"""`lora-assets train` on the embedded model, as a process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.planning.overrides import PlanOverrides
from finetune.planning.plan import make_plan
from finetune.publishing import publish_directory, read_manifest
from tests.profiles import PROFILE

PROGRAM = str(Path(sys.executable).with_name("lora-assets"))


@pytest.fixture
def directory(tmp_path: Path, tiny_model: BaseModelRef) -> Path:
    """A directory with a dataset and a plan of sixty steps."""
    lines = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    overrides = PlanOverrides(lora_rank=4, micro_batch=1, accumulation=2, max_steps=60, max_length=64)
    plan = make_plan(
        tiny_model.path,
        PROFILE,
        task="instruction",
        method="lora",
        overrides=overrides,
        vram_limit_gb=None,
        device="cpu",
    )
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    return tmp_path


def train(directory: Path, base_model: BaseModelRef, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    here = {"PATH": os.environ["PATH"], "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "DATA_ROOT": str(directory / "data")}
    return subprocess.Popen(
        [PROGRAM, "train", "--base-model", base_model.path, "--dataset", "train.jsonl", *arguments],
        cwd=directory,
        env={**here, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_training_that_was_stopped_goes_on_elsewhere_from_the_checkpoint_that_is_named(
    directory: Path, tiny_model: BaseModelRef
) -> None:
    stopped = train(directory, tiny_model, "--output", "a", "--plan", "plan.json")
    assert stopped.stderr is not None
    told = ""
    while "training: 1/60 steps" not in told:
        line = stopped.stderr.readline()
        assert line, told
        told += line
    stopped.send_signal(signal.SIGTERM)
    _, rest = stopped.communicate(timeout=120)
    assert stopped.returncode == 75, told + rest
    assert not (directory / "a").exists()
    (checkpoint,) = (directory / ".a.work").glob("*/checkpoints/checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 1 <= step < 60

    resume = ["--resume-from", str(checkpoint)]
    other = train(directory, tiny_model, "--output", "c", "--dora", *resume)
    resumed = train(directory, tiny_model, "--output", "b", "--plan", "plan.json", *resume, "--json")
    output, errors = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, errors
    result = json.loads(output)
    assert (result["resumed_from_step"], result["training_steps"]) == (step, 60)
    assert read_manifest(directory / "b", kind="adapter").parameters["max_steps"] == 60
    log = (directory / "b" / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 61))

    _, refused = other.communicate(timeout=200)
    assert other.returncode == 1
    assert "this checkpoint belongs to the training" in refused
    assert not (directory / "c").exists()


def test_two_machines_train_together_and_nobody_else_meanwhile(directory: Path, tiny_model: BaseModelRef) -> None:
    """Two processes with the environment that Kubeflow Trainer gives its pods."""
    plan = json.loads((directory / "plan.json").read_text())
    plan["trial_config"]["max_steps"] = 4
    (directory / "plan.json").write_text(json.dumps(plan))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    into = ["--output", "a", "--plan", "plan.json"]
    nodes = [train(directory, tiny_model, *into, **common, PET_NODE_RANK=str(rank)) for rank in range(2)]
    lock = directory / ".a.work" / "lock"
    while not (lock.exists() and lock.read_text()):
        assert nodes[0].poll() is None
        time.sleep(0.05)
    third = train(directory, tiny_model, *into)
    _, refused = third.communicate(timeout=200)
    assert third.returncode == 75, refused
    assert f"process {nodes[0].pid} on {socket.gethostname()} trains into this directory already" in refused
    assert not (directory / "a").exists()

    told = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    result = read_manifest(directory / "a", kind="adapter", verify="hashes").results
    assert result["training_steps"] == 4
    assert ["training: 4/4 steps" in errors for _, errors in told] == [True, False], "otherwise one trained alone"


def test_an_output_that_holds_the_adapter_of_another_training_is_refused(
    directory: Path, tiny_model: BaseModelRef
) -> None:
    with publish_directory(directory / "a", kind="adapter") as staging:
        staging.results = {"run_id": "file-0123456789"}
    _, refused = (process := train(directory, tiny_model, "--output", "a", "--plan", "plan.json")).communicate()
    assert process.returncode == 1
    assert "the adapter of another training, file-0123456789 instead of file-" in refused


@pytest.mark.parametrize("nodes", [[], ["--nodes", "2"]], ids=["one", "two"])
def test_a_machine_whose_number_is_too_high_is_refused(
    directory: Path, tiny_model: BaseModelRef, nodes: list[str]
) -> None:
    """It would wait for a machine that is none, or train without holding the output."""
    _, refused = (process := train(directory, tiny_model, "--output", "a", *nodes, "--node-rank", "2")).communicate()
    assert process.returncode == 1
    assert "2 is no number of" in refused
    assert not (directory / ".a.work").exists()
