"""`lora-assets experiment` as a process."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.layout import DataLayout
from finetune.progress import ignore_progress
from finetune.publishing import read_manifest
from finetune.reproduction.at_hand import Places, look_for_inputs
from finetune.reproduction.check import check, select
from finetune.reproduction.trace import trace
from resources.postgres import EmbeddedPostgres

PROGRAM = str(Path(sys.executable).with_name("lora-assets"))


def experiment(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, "experiment", *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "DATA_ROOT": "data", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_suggestion_needs_nothing_but_a_history(tmp_path: Path) -> None:
    space = {
        "method": {"choices": ["lora", "prefix"]},
        "lora_rank": {"choices": [4, 8]},
        "virtual_tokens": {"choices": [10]},
    }
    tried: list[dict[str, Any]] = [
        {"number": number, "params": {"method": "lora", "lora_rank": rank}, "state": "completed", "value": 1 / rank}
        for number, rank in enumerate([4, 8])
    ]
    (tmp_path / "question.json").write_text(json.dumps({"search_space": space, "trial_history": tried}))
    first = experiment(tmp_path, "suggest", "question.json", "--strategy", "random", "--json")
    assert first.returncode == 0, first.stderr
    chosen = json.loads(first.stdout)
    assert set(chosen) == ({"method", "lora_rank"} if chosen["method"] == "lora" else {"method", "virtual_tokens"})
    again = experiment(tmp_path, "suggest", "question.json", "--strategy", "random", "--json")
    assert again.stdout == first.stdout
    spent = experiment(tmp_path, "suggest", "question.json", "--trials-remaining", "0", "--json")
    assert json.loads(spent.stdout) is None
    assert not (tmp_path / "data").exists()


def test_a_question_that_is_none_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "question.json").write_text('{"search_space": {"learning_rate": {"low": "small"}}}')
    bad = experiment(tmp_path, "suggest", "question.json")
    assert bad.returncode == 1
    assert "question.json" in bad.stderr
    assert "Traceback" not in bad.stderr


SPEC = """
goal: the lowest held-out loss
dataset_path: records.jsonl
max_trials: 2
stop_patience: null
budget_gpu_hours: 1.0
methods: [lora, prefix]
strategy: random
tokens_per_second: 1000
auto_merge: true
parameters: [learning_rate, lora_rank, virtual_tokens]
fixed: {max_steps: 8, micro_batch: 1, accumulation: 1, max_length: 64}
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with an experiment, whose path is short enough for the socket of an embedded server."""
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short:
        lines = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(30)]
        Path(short, "records.jsonl").write_text("".join(lines))
        Path(short, "spec.yaml").write_text(SPEC)
        yield Path(short)


def test_a_dry_run_proposes_and_prices_all_trials_without_a_training_library(
    directory: Path, tiny_model: BaseModelRef
) -> None:
    script = (
        "import sys\n"
        "from lora_assets.cli.app import app\n"
        "app(['experiment', 'run', 'spec.yaml', '--dry-run', '--json'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets', 'bitsandbytes', 'accelerate'} "
        "& set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "BASE_MODEL_NAME": str(tiny_model.path), "GPU_HOUR_PRICE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    result = json.loads(done.stdout)
    proposed = result["data"]["proposed"]
    assert len(proposed) == 2
    assert len({json.dumps(row["params"]) for row in proposed}) == 2
    assert all(row["gpu_hours"] > 0 and row["price"] == 2 * row["gpu_hours"] for row in proposed)
    assert result["metadata"]["estimated_gpu_hours"] == sum(row["gpu_hours"] for row in proposed)
    assert not (directory / "data" / "postgres").exists()
    assert not (directory / "data" / "adapters").exists()


def test_an_experiment_that_was_killed_in_a_trial_is_resumed_merged_and_shown(
    directory: Path, tiny_model: BaseModelRef
) -> None:
    environment = {"BASE_MODEL_NAME": str(tiny_model.path), "OMP_WAIT_POLICY": "PASSIVE"}
    killed = subprocess.Popen(
        [PROGRAM, "experiment", "run", "spec.yaml"],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "DATA_ROOT": "data", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert killed.stderr is not None
    told = ""
    while "trial 1 ..." not in told or "training: 1/8" not in told.split("trial 1 ...")[1]:
        line = killed.stderr.readline()
        assert line, told
        told += line
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    (name,) = re.findall(r"^experiment (\w+)$", told, re.MULTILINE)

    resumed = experiment(directory, "resume", name, "--json", **environment)
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads(resumed.stdout)
    history = result["data"]["trial_history"]
    assert [(trial["state"], trial["attempts"]) for trial in history] == [("completed", 1), ("completed", 2)]
    best = min(history, key=lambda trial: trial["value"])
    assert result["data"]["best_trial"] == best
    assert result["data"]["stopped_by"] == "max_trials"
    assert result["metadata"]["total_trials"] == 2
    assert result["metadata"]["best_trial_id"] == best["trial_config"]["trial_id"]
    assert result["metadata"]["gpu_hours_used"] == sum(trial["gpu_hours"] for trial in history)
    merged = Path(result["metadata"]["merged_path"])
    assert result["artifacts"] == [str(merged)]
    assert list(merged.glob("*.safetensors"))
    assert "trial 1 completed" in result["output_text"]
    assert "started 2 times" in result["output_text"]

    report = directory / "data" / "experiments" / "brain" / name
    assert set(read_manifest(report, kind="experiment", verify="hashes").outputs) == {
        "budget.png",
        "experiment_manifest.json",
        "history.png",
        "parallel.png",
        "report.html",
        "result.json",
    }
    page = (report / "report.html").read_text()
    assert f"ADOPT_TRIAL={result['metadata']['adopt_trial']}" in page
    assert "http" not in page.replace("http-equiv", "")

    # Every figure and picture is followed to the file of records, and all of it can be done again.
    places = Places(DataLayout((directory / "data").absolute()), exports=directory)
    traced = trace(report, places)
    assert traced.broken == []
    assert {"best.eval_loss", "trial.0.eval_loss", "trial.1.seconds", "gpu_hours_used", "history.png"} <= set(
        traced.figures
    )
    assert {figure.value for name, figure in traced.figures.items() if name.endswith("eval_loss")} == {
        trial["value"] for trial in history
    }
    for chain in traced.chains.values():
        kinds = [link.kind for link in chain.links]
        assert kinds == ["evaluation", "records", "adapter", "training", "base model", "dataset", "export"]
        assert chain.links[-1].path == directory / "records.jsonl"
    # The merged model too: a byte of it that is another one is found by the hashes in the experiment's manifest.
    assert traced.merged is not None
    assert (traced.merged.state, traced.merged.path, traced.merged.name) == ("present", merged, best["run_id"])
    (weights,) = merged.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    damaged = trace(report, places).merged
    assert damaged is not None
    assert (damaged.state, damaged.reason) == (
        "changed",
        f"a file of the artifact was altered: its SHA-256 differs [{weights}]",
    )
    selection = select(report)
    at_hand = look_for_inputs(selection.manifest.inputs, places, weights=True, on_progress=ignore_progress)
    judged = check(selection, at_hand, places)
    assert set(judged.trainings) == {trial["run_id"] for trial in history}
    assert (judged.refusals, judged.not_prepared) == ([], {})

    # Each trial is in the run log like any training, the killed one too; nothing was trained twice.
    logged = subprocess.run(
        [PROGRAM, "runs", "--json"],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "DATA_ROOT": "data"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {row["training_run_id"]: row for row in json.loads(logged.stdout)}
    assert set(rows) == {trial["run_id"] for trial in history}
    assert {row["status"] for row in rows.values()} == {"COMPLETED"}
    listed = experiment(directory, "show", "--json")
    assert [row["name"] for row in json.loads(listed.stdout)] == [name]


# Priced at next to nothing, so that each trial takes far more than it has reserved.
SIDE_BY_SIDE = f"""
dataset_path: records.jsonl
workers: 2
max_trials: 1000
max_loop_iterations: 1000
stop_patience: null
budget_gpu_hours: {12 / 3600}
strategy: random
tokens_per_second: 1000000
parameters: [learning_rate]
fixed: {{max_steps: 200, micro_batch: 1, accumulation: 1, max_length: 64}}
"""


def test_two_workers_side_by_side_both_train_and_keep_to_the_budget(directory: Path, tiny_model: BaseModelRef) -> None:
    import sqlalchemy as sa

    (directory / "spec.yaml").write_text(SIDE_BY_SIDE)
    done = experiment(
        directory,
        *("run", "spec.yaml", "--json"),
        BASE_MODEL_NAME=str(tiny_model.path),
        OMP_WAIT_POLICY="PASSIVE",
        CHECKPOINT_SECONDS="120",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["data"]["stopped_by"] == "budget"
    # Seconds, of which importing the libraries takes some on a busy machine before anybody can look.
    used = 3600 * result["metadata"]["gpu_hours_used"]
    assert 0 < used <= 12 + 120
    assert {trial["state"] for trial in result["data"]["trial_history"]} <= {"completed", "pruned"}
    postgres = EmbeddedPostgres(directory / "data" / "postgres")
    with sa.create_engine(postgres.url, poolclass=sa.NullPool).connect() as connection:
        trained = connection.scalars(sa.text("SELECT training_run_id FROM lora_training_run_details")).all()
        workers = connection.scalars(
            sa.text("SELECT DISTINCT holder FROM lora_training_leases WHERE training_run_id LIKE 'experiment %'")
        ).all()
    postgres.close()
    assert len(trained) == len(set(trained)), "each configuration is trained once"
    assert len(workers) == 2, "one did it all"
