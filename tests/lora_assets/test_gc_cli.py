"""`lora-assets gc` on a data root: what it says is what it does, and a dry run does nothing."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from typer.testing import CliRunner

from finetune.layout import DataLayout
from finetune.publishing import publish_directory
from lora_assets.cli.app import app
from resources.run_log import RunLog
from tests.e2e.conftest import data_root


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Iterator[DataLayout]:
    with data_root() as root:
        root.mkdir(parents=True)
        monkeypatch.chdir(root)
        monkeypatch.setenv("DATA_ROOT", str(root))
        monkeypatch.delenv("DAGSTER_HOME", raising=False)
        monkeypatch.delenv("DATABASE_URL", raising=False)
        yield DataLayout(root)
        # The command sets it for Dagster.
        os.environ.pop("DAGSTER_HOME", None)


def old(path: Path) -> Path:
    with publish_directory(path, kind="thing") as staging:
        (staging.path / "file").write_bytes(b"x" * 1000)
    then = time.time() - 30 * 24 * 3600
    for each in [*path.rglob("*"), path]:
        os.utime(each, (then, then))
    return path


def gc(*arguments: str) -> dict[str, object]:
    done = CliRunner().invoke(app, ["gc", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def everything(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if "postgres" not in path.parts)


def test_a_dry_run_tells_what_the_next_run_removes_and_changes_nothing(layout: DataLayout) -> None:
    export, work = old(layout.model("r1", "gguf")), old(layout.work("r1"))
    before = everything(layout.root)
    planned = gc("--dry-run")
    assert everything(layout.root) == before
    assert {str(export), str(work)} == {row["path"] for row in planned["removed"]}  # type: ignore[attr-defined]
    assert planned["freed"] == sum(file.stat().st_size for path in (export, work) for file in path.iterdir())
    assert gc("--days", "31")["removed"] == []
    assert gc() == planned | {"dry_run": False}
    assert not export.exists()
    assert not work.exists()
    assert gc()["removed"] == []


def test_what_a_lease_or_a_running_row_or_a_run_is_about_stays(layout: DataLayout) -> None:
    for run_id in ("leased", "recorded", "free"):
        old(layout.work(run_id))
    export = old(layout.model("nobodys", "gguf"))
    log = RunLog(data_dir=str(layout.root))
    log.start(run_id="recorded", dataset_paths=["a"], base_model="tiny", backend="hf-peft", dagster_run_id="d")
    (layout.root / "dagster").mkdir()
    os.environ["DAGSTER_HOME"] = str(layout.root / "dagster")
    with log.lease("leased"), dg.DagsterInstance.get() as instance:
        run = instance.create_run_for_job(dg.GraphDefinition(name="train").to_job(), status=dg.DagsterRunStatus.STARTED)
        told = gc()
        assert told["unfinished_runs"] == 1
        assert [row["path"] for row in told["removed"]] == [str(layout.work("free"))]  # type: ignore[attr-defined]
        instance.report_run_failed(run)
    assert export.exists()
    assert {row["path"] for row in gc()["removed"]} == {str(export), str(layout.work("leased"))}  # type: ignore[attr-defined]
    assert layout.work("recorded").exists()
    log.close()


def test_for_a_person_it_prints_what_and_how_much(layout: DataLayout) -> None:
    export = old(layout.model("r1", "gguf"))
    done = CliRunner().invoke(app, ["gc", "--dry-run"])
    assert str(export) in done.stdout
    assert "of versions that are not kept" in done.stdout
    assert "would remove 1 things: 0.0 MB" in done.stdout
