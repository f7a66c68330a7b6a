"""What goes wrong says what, where and what to do; leaves nothing half-made; and the run is marked FAILED."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.publishing import MANIFEST_NAME, TEMPORARY_MARK
from lora_assets.cli.demo import EXAMPLES
from tests.e2e.conftest import DATES, PROGRAM, Loop

pytestmark = pytest.mark.e2e


def arrive(loop: Loop, date: str = DATES[0]) -> None:
    loop.layout.exports.mkdir(parents=True, exist_ok=True)
    for file in EXAMPLES.glob(f"*{date}*"):
        shutil.copy(file, loop.layout.exports)


def assert_plain(done: subprocess.CompletedProcess[str], *parts: str, code: int = 1) -> None:
    """One clear error with these parts, no traceback, and the exit code."""
    text = " ".join(done.stderr.split())
    assert done.returncode == code, text
    for part in parts:
        assert part in text, f"{part!r} not in {text}"
    assert "Traceback" not in done.stdout + done.stderr


def assert_nothing_half_made(loop: Loop) -> None:
    assert list(loop.root.rglob(f"*{TEMPORARY_MARK}*")) == []
    for folder in ("prepared", "adapters", "models"):
        for manifest_of in (loop.root / folder).rglob("adapter_model.safetensors"):
            assert (manifest_of.parent / MANIFEST_NAME).is_file()


def published_datasets(loop: Loop) -> list[Path]:
    """Complete datasets; the hidden index of what is known of each file is a cache and no dataset."""
    return [path for path in (loop.root / "prepared").rglob(MANIFEST_NAME) if ".index" not in path.parts]


def run_statuses(loop: Loop) -> list[str]:
    """Statuses of Dagster's runs under this data root."""
    import sqlite3

    with sqlite3.connect(loop.root / "dagster" / "history" / "runs.db") as connection:
        return [status for (status,) in connection.execute("SELECT status FROM runs ORDER BY id")]


def test_no_exports(loop: Loop) -> None:
    loop.layout.exports.mkdir(parents=True)
    assert_plain(loop.run("run"), "no exports", "brain_dataset_*.jsonl", str(loop.layout.exports), "EXPORTS_DIR")


def test_a_missing_directory_of_exports(loop: Loop) -> None:
    assert_plain(loop.run("run"), str(loop.layout.exports))


@pytest.mark.skipif(shutil.which("setpriv") is None and os.geteuid() == 0, reason="needs setpriv to drop root's rights")
def test_an_unreadable_directory_of_exports(loop: Loop, tmp_path: Path) -> None:
    loop.layout.exports.mkdir(parents=True)
    loop.layout.exports.chmod(0o000)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if user:
        # The directories above must let the other user through, so that the export directory is what stops it.
        for parent in loop.layout.exports.parents:
            if parent.is_relative_to(Path("/tmp")) and parent != Path("/tmp"):
                parent.chmod(0o755)
    done = subprocess.run(
        [*user, PROGRAM, "run", "--dry-run"], env=loop.environment, capture_output=True, text=True, check=False
    )
    loop.layout.exports.chmod(0o755)
    assert_plain(done, str(loop.layout.exports))
    assert "ermission" in done.stderr or "read" in done.stderr


def test_an_unknown_backend(loop: Loop) -> None:
    arrive(loop)
    assert_plain(loop.run("run", TRAINING_BACKEND="openai"), "TRAINING_BACKEND=openai", "'hf-peft' or 'h2o'")


def test_a_date_without_exports(loop: Loop) -> None:
    arrive(loop)
    assert_plain(loop.run("run", "--date", "1999-01-01"), "no exports of 1999-01-01", DATES[0])


def test_a_database_that_does_not_answer_is_told_at_once_and_may_be_tried_again(loop: Loop) -> None:
    arrive(loop)
    done = loop.run("run", DATABASE_URL="postgresql://me:s3cret@127.0.0.1:9/runs")
    assert_plain(done, "DATABASE_URL", "does not answer", code=75)
    assert "s3cret" not in done.stdout + done.stderr
    assert not (loop.root / "prepared").exists()


def test_a_data_root_that_cannot_be_written_to(loop: Loop) -> None:
    arrive(loop)
    done = loop.run("run", DATA_ROOT="/proc/nowhere", EXPORTS_DIR=str(loop.layout.exports))
    assert_plain(done, "/proc/nowhere", "Set DATA_ROOT")


def test_a_plan_that_is_none(loop: Loop) -> None:
    plan = loop.root / "plan.json"
    plan.write_text("{")
    dataset, output = str(next(EXAMPLES.glob("*wiki*"))), str(loop.root / "a")
    arguments = ["train", "--dataset", dataset, "--output", output, "--plan"]
    assert_plain(loop.run(*arguments, str(plan)), str(plan), "not a TrainingPlan")
    assert_plain(loop.run(*arguments, str(plan) + "x"), "cannot be read")


def test_an_export_with_only_bad_lines_fails_the_run(loop: Loop) -> None:
    loop.layout.exports.mkdir(parents=True)
    bad = loop.layout.exports / "brain_dataset_2026-07-01.jsonl"
    bad.write_text('{"instruction": "x"}\n[1]\n{"instruction": "no end')
    done = loop.run("run")
    assert_plain(done, "none of the 3 lines is a record", "half_line", f"{bad.name}:3")
    assert run_statuses(loop) == ["FAILURE"]
    assert_nothing_half_made(loop)
    assert not published_datasets(loop)


def test_a_corrupted_base_model_fails_the_run(loop: Loop, tiny_model: BaseModelRef, tmp_path: Path) -> None:
    arrive(loop)
    model = tmp_path / "model"
    shutil.copytree(tiny_model.path, model)
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    done = loop.run("run", BASE_MODEL_NAME=str(model))
    assert_plain(done, str(weights))
    assert done.stderr.count("loading the base model") <= 1, "what cannot be helped is not tried again"
    assert run_statuses(loop) == ["FAILURE"]
    assert_nothing_half_made(loop)


def test_a_base_model_that_nobody_can_reach(loop: Loop) -> None:
    arrive(loop)
    done = loop.run("run", BASE_MODEL_NAME="nobody/nothing", HF_ENDPOINT="http://127.0.0.1:9")
    assert_plain(done, "BASE_MODEL_NAME", "nobody/nothing")
    assert run_statuses(loop) == ["FAILURE"]


def test_a_method_that_needs_a_gpu(loop: Loop) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arrive(loop)
    # The plan for a card asks for flash attention or bf16 kernels only on request; the optimizer needs CUDA.
    done = loop.run(
        "train",
        "--dataset",
        str(next(EXAMPLES.glob("*wiki*"))),
        "--output",
        str(loop.root / "a"),
        "--attention",
        "flash_attention_2",
    )
    assert_plain(done, "GPU")
    assert not (loop.root / "a").exists()


def test_a_full_disk_fails_the_run_and_leaves_nothing(loop: Loop, tmp_path: Path) -> None:
    """The data root's `prepared` is a file system of its own that is full; Dagster's history still fits."""
    arrive(loop)
    prepared = loop.root / "prepared"
    prepared.mkdir()
    script = f"mount -t tmpfs -o size=24k tmpfs {prepared} && {PROGRAM} run; code=$?; find {prepared}; exit $code"
    probe = subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True)
    if probe.returncode != 0:
        pytest.skip("needs user namespaces or root to mount a small file system")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=loop.environment, capture_output=True, text=True, check=False
    )
    assert_plain(done, "no space left", "Free space", code=75)
    assert TEMPORARY_MARK not in done.stdout
    found = [line for line in done.stdout.splitlines() if line.endswith(MANIFEST_NAME) and ".index" not in line]
    assert found == []
    assert run_statuses(loop) == ["FAILURE"]
