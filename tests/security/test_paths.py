"""Names that come from outside: none leads out of the data root, whichever door it takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from typer.testing import CliRunner

from finetune.dataset.discovery import discover_exports
from finetune.errors import ArtifactError, ConfigurationError
from finetune.registry.store import get_version
from lora_assets.cli.app import app
from lora_assets.cli.demo import EXAMPLES
from resources.artifact_store import ValueStore
from tests.e2e.conftest import Loop

HOSTILE = ["../../x", "9999/../../x", "/etc/x", "..", "x\0y", "a/b"]

# A partition that a person added in the UI: Dagster itself forbids few characters in a key.
HOSTILE_PARTITION = """
import sys
import dagster as dg
from lora_assets.definitions import defs
from lora_assets.partitions import dataset_dates
with dg.DagsterInstance.ephemeral() as instance:
    instance.add_dynamic_partitions(dataset_dates.name, [sys.argv[1]])
    result = defs.resolve_job_def("train_and_export").execute_in_process(
        instance=instance, partition_key=sys.argv[1], raise_on_error=False,
        asset_selection=[dg.AssetKey(["brain", "merged_dataset"])],
    )
    print(result.success, [e.step_failure_data.error.to_string() for e in result.all_events if e.is_step_failure])
"""


def everything(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if "__pycache__" not in path.parts}


def test_a_partition_that_leads_elsewhere_fails_and_writes_nothing_there(loop: Loop) -> None:
    loop.layout.exports.mkdir(parents=True)
    for file in EXAMPLES.glob("*2026-06-01*"):
        shutil.copy(file, loop.layout.exports)
    outside = everything(loop.root.parent) - everything(loop.root)
    done = subprocess.run(
        # Later than every date: each export is in its window.
        [sys.executable, "-c", HOSTILE_PARTITION, "9999/../../../../escaped"],
        env=loop.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.startswith("False"), done.stdout + done.stderr[-2000:]
    assert "cannot be part of a path" in done.stdout
    assert everything(loop.root.parent) - everything(loop.root) == outside
    assert not list(loop.root.rglob("escaped*"))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_value_is_not_kept_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be part of a path"):
        ValueStore(directory=str(tmp_path / "values")).path_of(dg.AssetKey(["brain", "adapter"]), name)


@pytest.mark.parametrize("name", [*HOSTILE, "v0", "v01", "v1/../v2", "v1 "])
def test_a_version_elsewhere_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "registry").mkdir()
    with pytest.raises(ArtifactError, match="the registry has no version"):
        get_version(tmp_path / "registry", name)


@pytest.mark.parametrize("command", [["registry", "show"], ["registry", "promote"], ["registry", "verify"], ["push"]])
def test_the_command_line_takes_no_version_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("HUB_REPO", "acme/brain")
    result = CliRunner().invoke(app, [*command, "../../v1"])
    assert result.exit_code == 1
    assert "../../v1" in result.output


def test_the_command_line_takes_no_date_elsewhere(loop: Loop) -> None:
    loop.layout.exports.mkdir(parents=True)
    shutil.copy(next(EXAMPLES.glob("*2026-06-01*")), loop.layout.exports)
    done = loop.run("run", "--date", "../../x")
    assert done.returncode == 1
    assert "no exports of ../../x" in done.stderr


@pytest.mark.parametrize("name", ["../brain", "a/b", "", "Brain", "a" * 41])
def test_a_pipelines_name_is_part_of_paths_and_keys(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from lora_assets.settings import load_settings

    monkeypatch.setenv("PIPELINE_NAME", name)
    if not name:  # counts as unset
        assert load_settings().pipeline_name == "brain"
        return
    with pytest.raises(ConfigurationError, match="PIPELINE_NAME"):
        load_settings()


def test_an_exports_odd_name_stays_a_name(tmp_path: Path) -> None:
    odd = [
        "brain_dataset_2026-06-01_$(id).jsonl",
        "brain_dataset_2026-06-01_..jsonl",
        "brain_dataset_2026-06-01_\n.jsonl",
    ]
    for name in odd:
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "brain_dataset_dir.jsonl").mkdir()
    found = discover_exports(tmp_path)
    assert sorted(file.name for file in found) == sorted(odd)
    assert {file.date for file in found} == {"2026-06-01"}
    assert all(file.path.parent == tmp_path for file in found)
