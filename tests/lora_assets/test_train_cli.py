"""`lora-assets train` on the embedded model, as a process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.dataset.models import DatasetProfile
from finetune.planning.overrides import PlanOverrides
from finetune.planning.plan import make_plan
from finetune.publishing import read_manifest

PROGRAM = str(Path(sys.executable).with_name("lora-assets"))


@pytest.fixture
def directory(tmp_path: Path, tiny_model: BaseModelRef) -> Path:
    """A directory with a dataset and a plan of sixty steps."""
    lines = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    profile = DatasetProfile(
        total_samples=24,
        format_detected="jsonl",
        has_instruction=True,
        has_output=True,
        avg_tokens=30,
        max_tokens=40,
        columns=[],
        duplicates_found=0,
        total_tokens=720,
    )
    overrides = PlanOverrides(lora_rank=4, micro_batch=1, accumulation=2, max_steps=60, max_length=64)
    plan = make_plan(
        tiny_model.path,
        profile,
        task="instruction",
        method="lora",
        overrides=overrides,
        vram_limit_gb=None,
        device="cpu",
    )
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    return tmp_path


def train(directory: Path, base_model: BaseModelRef, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PROGRAM, "train", "--base-model", base_model.path, "--dataset", "train.jsonl", *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "DATA_ROOT": str(directory / "data")},
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
