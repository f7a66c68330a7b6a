"""Plans, dry runs and budgets on the command line, in processes that cannot import a training library."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.planning.history import Measurement
from finetune.planning.models import TrainingPlan
from finetune.training.models import TrainingResult
from resources.run_log import RunLog

MODELS = Path(__file__).parents[2] / "benchmarks" / "memory" / "models"
EXAMPLES = Path(__file__).parents[2] / "examples" / "exports"
WITHOUT_LIBRARIES = """
import sys
for name in ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "safetensors"):
    sys.modules[name] = None
sys.argv[0] = "lora-assets"
from lora_assets.cli.app import main
main()
"""


def lora_assets(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DAGSTER", "PYTEST"))}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARIES, *arguments],
        cwd=directory,
        env=inherited | {"DATA_ROOT": str(directory / "data"), "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    lines = [{"instruction": f"What is the port of service {n}?", "output": f"It is {4000 + n}."} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def planned(directory: Path, *arguments: str, **environment: str) -> TrainingPlan:
    done = lora_assets(directory, "plan", *arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return TrainingPlan.model_validate_json(done.stdout)


def test_values_given_are_kept_and_the_rest_is_chosen(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(
        json.dumps(
            {
                "total_samples": 5000,
                "format_detected": "jsonl",
                "has_instruction": True,
                "has_output": True,
                "avg_tokens": 200,
                "max_tokens": 700,
                "columns": [],
                "duplicates_found": 0,
                "total_tokens": 1_000_000,
            }
        )
    )
    plan = planned(
        tmp_path,
        *("--base-model", str(MODELS / "llama-3-8b"), "--method", "lora", "--task", "style"),
        *("--vram-limit-gb", "80", "--dataset-profile", str(profile), "--rank", "4"),
        *("--target-modules", "q_proj,v_proj", "--target-modules", "o_proj", "--max-length", "333"),
        *("--micro-batch", "3", "--gradient-checkpointing", "--attention", "flash", "--optimizer", "adamw_8bit"),
        TOKENS_PER_SECOND="2000",
        GPU_HOUR_PRICE="2.5",
    )
    trial: dict[str, Any] = plan.trial_config.model_dump()
    given = {
        "method": "lora",
        "task": "style",
        "lora_rank": 4,
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "max_length": 333,
        "micro_batch": 3,
        "gradient_checkpointing": True,
        "attention": "flash_attention_2",
        "optimizer": "adamw_8bit",
    }
    assert {name: trial[name] for name in given} == given
    assert trial["precision"] == "bf16"
    assert plan.memory_estimate.fits is True
    assert plan.cost is not None
    assert plan.estimated_tokens == 3_000_000
    assert plan.cost.gpu_hours == pytest.approx(3_000_000 / 2000 / 3600)
    assert plan.cost.price == pytest.approx(3_000_000 / 2000 / 3600 * 2.5)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "ia3"])
def test_every_method_is_planned_for_a_directory_with_only_a_configuration(tmp_path: Path, method: str) -> None:
    arguments = ["--base-model", str(MODELS / "tiny-llama-1.1b"), "--method", method, "--vram-limit-gb", "80"]
    plan = planned(tmp_path, *arguments, "--no-gradient-checkpointing")
    assert plan.trial_config.method == method
    assert plan.trial_config.gradient_checkpointing is False
    assert set(plan.memory_estimate.parts) == {
        "weights",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "overhead",
    }


def test_a_person_reads_each_choice_with_its_reason(tmp_path: Path) -> None:
    done = lora_assets(tmp_path, "plan", "--base-model", str(MODELS / "llama-3-8b"), "--vram-limit-gb", "12")
    assert done.returncode == 0, done.stderr
    for said in ("lora_rank 16", "for the task instruction", "method now qlora", "activations", "fits 12.0 GB"):
        assert said in done.stdout, said


def test_a_method_given_is_not_given_up_to_fit(tmp_path: Path) -> None:
    arguments = ["plan", "--base-model", str(MODELS / "llama-3-8b"), "--vram-limit-gb", "12", "--method", "lora"]
    done = lora_assets(tmp_path, *arguments)
    assert done.returncode == 1
    assert "GB and 12.0 GB are there (weights 16.06" in done.stderr


def test_earlier_trainings_in_the_run_log_correct_the_plan(tmp_path: Path) -> None:
    model = str(MODELS / "tiny-llama-1.1b")
    arguments = ["--base-model", model, "--vram-limit-gb", "80"]
    before = planned(tmp_path, *arguments)
    log = RunLog(data_dir=str(tmp_path / "data"))
    try:
        row_id = log.start(run_id="r1", dataset_paths=[], base_model=model, backend="hf-peft")
        log.measured(
            row_id,
            Measurement(
                method="lora", device="NVIDIA L4", estimated_memory_gb=10, peak_memory_gb=9, tokens_per_second=1000
            ),
        )
        log.complete(row_id, "/a", {})
    finally:
        log.close()
    after = planned(tmp_path, *arguments)
    assert after.memory_estimate.vram_gb == pytest.approx(0.9 * before.memory_estimate.vram_gb, rel=1e-4)
    assert after.cost is not None
    assert after.cost.throughput == "measured, median of 1"


def test_a_plan_does_without_a_run_log_that_does_not_answer(tmp_path: Path) -> None:
    arguments = ["plan", "--base-model", str(MODELS / "tiny-llama-1.1b"), "--json"]
    done = lora_assets(tmp_path, *arguments, DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert done.returncode == 0
    assert "not corrected by earlier trainings" in done.stderr
    assert TrainingPlan.model_validate_json(done.stdout).memory_estimate.correction == 1.0


def test_a_dry_run_goes_up_to_the_first_step_and_tells_the_plan(
    tmp_path: Path, tiny_model: BaseModelRef, records: Path
) -> None:
    arguments = ["train", "--base-model", str(tiny_model.path), "--dataset", str(records), "--output", "adapter"]
    done = lora_assets(tmp_path, *arguments, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    result = TrainingResult.model_validate_json(done.stdout)
    assert result.status == "dry_run"
    assert result.plan is not None
    assert result.training_steps == result.plan.estimated_steps == 15
    assert result.tokens_seen == result.plan.estimated_tokens
    assert result.plan.explanations
    assert not list(tmp_path.glob("*adapter*")), "a dry run leaves nothing behind"
    shown = lora_assets(tmp_path, *arguments, "--dry-run")
    assert "lora_rank 16" in shown.stdout
    assert "dry_run" in shown.stdout


def test_a_dry_run_refuses_what_a_training_would_refuse(
    tmp_path: Path, tiny_model: BaseModelRef, records: Path
) -> None:
    arguments = ["train", "--base-model", str(tiny_model.path), "--dataset", str(records), "--output", "adapter"]
    done = lora_assets(tmp_path, *arguments, "--dry-run", MAX_LENGTH="8")
    assert done.returncode == 1
    assert "nothing to learn from" in done.stderr


def test_full_fine_tuning_is_estimated_and_a_training_of_such_a_plan_refused(
    tmp_path: Path, tiny_model: BaseModelRef, records: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(planned(tmp_path, "--base-model", str(tiny_model.path), "--method", "full").model_dump_json())
    arguments = ["train", "--base-model", str(tiny_model.path), "--dataset", str(records), "--output", "adapter"]
    done = lora_assets(tmp_path, *arguments, "--plan", str(plan), "--dry-run")
    assert done.returncode == 1
    assert "full is estimated in plans but not trained [method]. Choose lora, qlora, prefix, ia3" in done.stderr


def test_a_training_that_would_take_too_long_does_not_start(
    tmp_path: Path, tiny_model: BaseModelRef, records: Path
) -> None:
    arguments = ["train", "--base-model", str(tiny_model.path), "--dataset", str(records), "--output", "adapter"]
    limits = {"TOKENS_PER_SECOND": "1", "MAX_GPU_HOURS": "0.25"}
    done = lora_assets(tmp_path, *arguments, **limits)
    assert done.returncode == 1
    assert "GPU-hours and may take 0.25" in done.stderr
    assert "at 1 tokens per second, stated" in done.stderr
    assert "[MAX_GPU_HOURS]" in done.stderr
    assert not (tmp_path / "adapter").exists()
    allowed = lora_assets(tmp_path, *arguments, "--dry-run", **limits | {"MAX_GPU_HOURS": "100"})
    assert allowed.returncode == 0, "otherwise it was refused for something else"


def test_the_loop_stops_before_a_training_that_would_take_too_long(tmp_path: Path, tiny_model: BaseModelRef) -> None:
    exports = tmp_path / "data" / "datasets" / "brain"
    exports.mkdir(parents=True)
    for file in EXAMPLES.glob("*2026-06-01*"):
        (exports / file.name).write_bytes(file.read_bytes())
    done = lora_assets(
        tmp_path,
        *("run", "--all", "--json"),
        BASE_MODEL_NAME=str(tiny_model.path),
        TOKENS_PER_SECOND="1",
        MAX_GPU_HOURS="0.5",
        MAX_REJECT_RATE="1",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    [outcome] = json.loads(done.stdout)["runs"]
    assert "GPU-hours and may take 0.5" in outcome["error"]
    assert outcome["transient"] is False
    [plan] = [step for step in outcome["steps"] if step["asset"] == "training_plan"]
    assert plan["figures"]["estimated_gpu_hours"] > 0.5
    assert not (tmp_path / "data" / "adapters").exists()
    log = RunLog(data_dir=str(tmp_path / "data"))
    try:
        assert log.recent() == []
    finally:
        log.close()
