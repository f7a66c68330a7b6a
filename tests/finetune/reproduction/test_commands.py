"""`lora-assets reproduce` and `lora-assets trace`: exit codes, what is printed, and a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from finetune.publishing import publish_directory, read_manifest, withdraw
from finetune.reproduction.manifest import experiment_manifest, write_manifest
from finetune.reproduction.models import EXPERIMENT_MANIFEST, MergedOutput
from finetune.training.checkpoints import newest_complete
from lora_assets.cli.app import app
from lora_assets.settings import RECORDED, Settings, is_secret
from tests.finetune.reproduction.conftest import Published

PROGRAM = str(Path(sys.executable).with_name("lora-assets"))


@pytest.fixture
def run(published: Published, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("DATA_ROOT", str(published.layout.root))
    monkeypatch.setenv("COLUMNS", "400")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def changed(published: Published, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads((published.first / EXPERIMENT_MANIFEST).read_bytes())
    change(content)
    path = tmp_path / EXPERIMENT_MANIFEST
    path.write_text(json.dumps(content))
    return path


def test_a_reproduction_that_is_killed_goes_on_from_its_own_checkpoint_and_ends_with_0(
    published: Published, tmp_path: Path, run: Callable[..., Result]
) -> None:
    run_id, output = published.trainings[0].run_id, tmp_path / "again"
    killed = subprocess.Popen(
        [PROGRAM, "reproduce", str(published.first), "--output", str(output)],
        env={name: os.environ[name] for name in ("PATH", "HOME", "DATA_ROOT") if name in os.environ}
        | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while newest_complete(output / "work" / run_id / "checkpoints") is None:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    adapter = output / "adapters" / "brain" / run_id
    assert not adapter.exists(), "it was killed too late"

    done = run("reproduce", published.first, "--output", output, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)["reproduced"]
    assert result["equal"] is True
    assert [training["verdict"] for training in result["trainings"]] == ["bit-identical"]
    assert read_manifest(adapter).results["resumed_from_step"] >= 1


def test_a_result_that_is_different_ends_with_1_and_says_how(
    published: Published, tmp_path: Path, run: Callable[..., Result]
) -> None:
    def reseed(content: dict[str, Any]) -> None:
        content["trainings"][0]["request"]["plan"]["trial_config"]["seed"] = 9

    done = run("reproduce", changed(published, tmp_path, reseed), "--output", tmp_path / "again")
    assert done.exit_code == 1
    assert "same bits were to come out" in done.output
    assert "eval_loss" in done.output
    assert f"different: {tmp_path / 'again'}" in done.output


def test_what_cannot_be_run_ends_with_2_and_the_name_of_what_is_wrong(
    published: Published, tmp_path: Path, run: Callable[..., Result]
) -> None:
    def grow(content: dict[str, Any]) -> None:
        content["inputs"]["exports"][0]["size"] += 1

    path = changed(published, tmp_path, grow)
    for words in (["--check-only"], ["--output", tmp_path / "again"]):
        done = run("reproduce", path, *words)
        assert done.exit_code == 2
        assert "cannot be run: export brain_dataset_2026-06-01.jsonl has changed" in done.output
    assert not (tmp_path / "again").exists()
    assert run("reproduce", tmp_path / "nothing.json").exit_code == 2
    # Nor is a place that cannot be made a result that is different.
    done = run("reproduce", published.first, "--output", path / "again")
    assert done.exit_code == 2, done.output
    assert "Not a directory" in done.output
    done = run("reproduce", published.first, "--training", "20260101-0")
    assert done.exit_code == 2
    assert published.trainings[0].run_id in done.output


def test_a_check_tells_what_is_at_hand_and_what_is_otherwise_and_makes_nothing(
    published: Published, tmp_path: Path, run: Callable[..., Result]
) -> None:
    def older(content: dict[str, Any]) -> None:
        content["trainings"][0]["provenance"]["libraries"]["torch"] = "2.0.0"

    work = sorted((published.layout.root / "work").iterdir())
    done = run("reproduce", changed(published, tmp_path, older), "--check-only")
    assert done.exit_code == 0, done.output
    for told in ("brain_dataset_2026-06-08.jsonl", "present", "torch", "2.0.0", "lora-assets-tiny"):
        assert told in done.output
    assert sorted((published.layout.root / "work").iterdir()) == work


def test_a_byte_of_the_merged_model_that_was_altered_ends_with_1_and_one_that_was_removed_is_told(
    published: Published, tmp_path: Path, run: Callable[..., Result]
) -> None:
    with publish_directory(tmp_path / "merged", kind="merged_model") as staging:
        weights = staging.path / "model.safetensors"
        weights.write_bytes(bytes(1000))
    whole = read_manifest(tmp_path / "merged").outputs
    manifest = experiment_manifest(
        kind="hpo_study",
        name="merged",
        configuration={},
        seed=None,
        trainings={},
        exports=published.layout.exports,
        environment={},
        secrets=[],
        figures={},
    )
    merged = MergedOutput(run_id="r1", path=tmp_path / "merged", outputs=whole)
    with publish_directory(tmp_path / "report", kind="experiment") as staging:
        write_manifest(staging.path, manifest.model_copy(update={"merged": merged}))

    def traced(code: int, said: str) -> None:
        done = run("trace", tmp_path / "report")
        assert (done.exit_code, f"the merged model of r1 is {said}" in done.output) == (code, True), done.output

    traced(0, "present")
    weights = tmp_path / "merged" / "model.safetensors"
    weights.write_bytes(bytes(500) + b"\1" + bytes(499))
    traced(1, "changed: a file of the artifact was altered")
    with publish_directory(tmp_path / "merged", kind="merged_model") as staging:
        (staging.path / "model.safetensors").write_bytes(weights.read_bytes())
    traced(1, "changed: it is another one than was merged then")
    withdraw(tmp_path / "merged")
    traced(0, "missing")


def test_a_figure_is_traced_to_its_exports_and_a_broken_link_ends_with_1(
    published: Published, tmp_path: Path, run: Callable[..., Result]
) -> None:
    done = run("trace", published.first, "eval_loss")
    assert done.exit_code == 0, done.output
    for told in ("eval_loss", published.trainings[0].run_id, "brain_dataset_2026-06-01.jsonl", "0 of 1 figures"):
        assert told in done.output
    export = published.layout.exports / "brain_dataset_2026-06-01.jsonl"
    hidden = export.rename(tmp_path / export.name)
    try:
        done = run("trace", published.first, "--json")
    finally:
        hidden.rename(export)
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert set(told["broken"]) == {"eval_loss", "base_loss"}
    (chain,) = told["chains"].values()
    assert [link["name"] for link in chain["links"] if link["state"] == "missing"] == [export.name]
    assert run("trace", published.first, "speed").exit_code == 1


def test_no_setting_that_is_recorded_can_hold_a_secret_and_every_value_is_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secrets = {
        "HF_TOKEN": "hf_31f8sentinel",
        "H2O_API_KEY": "5c0d-sentinel",
        "DATABASE_URL": "postgresql://me:8e7b-sentinel@127.0.0.1:1/db",
        "SAMPLES_DATABASE_URL": "postgresql://me:27aa-sentinel@127.0.0.1:1/db",
        "ALERT_WEBHOOK_URL": "http://127.0.0.1:1/services/d913-sentinel",
    }
    fields = Settings.model_fields
    assert {name.upper() for name, field in fields.items() if is_secret(field)} == set(secrets)
    assert not any(is_secret(fields[name]) for name in RECORDED)
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    # What a person may have written where it does not belong.
    monkeypatch.setenv("BASE_MODEL_NAME", "https://me:word-sentinel@hub/model")
    monkeypatch.setenv("EVAL_TASKS", "hf_31f8sentinel")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5c0d-sentinel")
    recorded = Settings().recorded
    assert recorded["BASE_MODEL_NAME"] == "https://***@hub/model"
    assert "sentinel" not in json.dumps(recorded)
    assert recorded["EVAL_TASKS"] == "***"
    assert recorded["SEED"] == "42"
