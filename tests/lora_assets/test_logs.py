"""Log lines of real runs and commands: as JSON each names its run, date and step; no secret in either form."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECRET = "h2o-key-5k2"
CODE = """
import logging, os, sys
import dagster as dg
from lora_assets.logs import TAGS, console

@dg.op
def adapter(context):
    print("captured", sys.argv[1], os.environ["LOG_FORMAT"])
    context.log.info("training: 3/4 steps, Привіт")
    logging.getLogger("finetune.training").warning("refused %s", "h2o-key-5k2")
    raise ValueError("boom with h2o-key-5k2")

@dg.job(logger_defs={"console": console})
def train():
    adapter()

command = sys.argv[1] == "command"
with dg.DagsterInstance.get() as instance:
    train.execute_in_process(
        instance=instance,
        raise_on_error=False,
        tags={"dagster/partition": "2026-06-01", **(TAGS if command else {})},
        run_config={"loggers": {"console": {}}} if command else None,
    )
"""


# What Dagster mirrors captured output with, on a machine that is too busy to let it read.
TAIL = "#!/bin/sh\nexec sleep 600\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dagster's home with the settings that the project ships."""
    path = tmp_path_factory.mktemp("dagster")
    (path / "dagster.yaml").write_bytes((ROOT / "lora_assets" / "dagster.yaml").read_bytes())
    (path / "bin").mkdir()
    (path / "bin" / "tail").write_text(TAIL)
    (path / "bin" / "tail").chmod(0o755)
    return path


def run(home: Path, who: str, log_format: str) -> subprocess.CompletedProcess[str]:
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "DAGSTER_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, who],
        env=environment | {"LOG_FORMAT": log_format, "H2O_API_KEY": SECRET},
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"captured {who} {log_format}\n" in [file.read_text() for file in home.glob("storage/*/compute_logs/*.out")]
    assert "captured" not in done.stdout
    return done


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def check(lines: list[dict[str, Any]]) -> None:
    assert len({line["run_id"] for line in lines}) == 1
    assert {line["date"] for line in lines} == {"2026-06-01"}
    assert {line["job"] for line in lines} == {"train"}
    [progress] = [line for line in lines if "Привіт" in line["message"]]
    assert (progress["level"], progress["step"]) == ("INFO", "adapter")
    assert progress["timestamp"].endswith("+00:00")
    [library] = [line for line in lines if line["message"] == "refused ***"]
    assert (library["level"], library["step"]) == ("WARNING", "adapter")
    [failure] = [line for line in lines if line.get("event") == "STEP_FAILURE"]
    assert "boom with ***" in failure["error"]


def test_of_a_run_that_the_daemon_or_a_pod_executes_every_line_on_standard_output_is_json(home: Path) -> None:
    check(objects(run(home, "daemon", "json").stdout))


def test_of_a_commands_run_the_lines_are_on_standard_error_and_leave_standard_output_alone(home: Path) -> None:
    done = run(home, "command", "json")
    assert done.stdout == ""
    check(objects(done.stderr))
    assert SECRET not in done.stderr


def test_as_text_a_commands_run_is_told_in_short_lines_without_secrets(home: Path) -> None:
    done = run(home, "command", "text")
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "adapter" in line]
    assert [line.split(maxsplit=2)[1:] for line in lines] == [
        ["adapter", "training: 3/4 steps, Привіт"],
        ["adapter", "refused ***"],
    ]


def test_what_a_command_tells_on_standard_error_is_json_too(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "DATA_ROOT": str(tmp_path),
        "LOG_FORMAT": "json",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from lora_assets.cli.app import main; main()", "run", "--json"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    [line] = objects(done.stderr)
    assert (line["level"], line["logger"]) == ("ERROR", "lora_assets.cli")
    assert str(tmp_path / "datasets") in line["message"]
