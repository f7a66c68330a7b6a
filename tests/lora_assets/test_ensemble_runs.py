"""Ensembles as an asset and as a command, which is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.dataset.prepare import prepare_dataset
from finetune.dataset.profile import profile_dataset
from finetune.search.ensemble.result import EnsembleResult
from lora_assets.assets import ensemble as asset
from lora_assets.assets.common import COMMON, made_from
from lora_assets.checks import combination_beats_best_member
from lora_assets.partitions import dataset_dates
from lora_assets.settings import Settings
from resources.artifact_store import ValueStore
from resources.base_model import BaseModelSource
from resources.run_log import RunLog
from tests.lora_assets.ensemble_records import FIXED, records
from tests.lora_assets.traces import traced

ENSEMBLE = [str(Path(sys.executable).with_name("lora-assets")), "experiment", "ensemble", "spec.yaml"]
DATE = "2026-06-01"


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A data root whose path is short enough for the socket of an embedded server."""
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short:
        yield Path(short)


def materialize(settings: Settings, base: str, config: dict[str, Any]) -> dg.ExecuteInProcessResult:
    layout = settings.layout
    records(layout.exports / f"brain_dataset_{DATE}.jsonl")

    @dg.asset(**COMMON)
    def merged_dataset() -> PreparedDataset:
        return prepare_dataset(
            discover_exports(layout.exports), date=DATE, layout=layout, parameters=settings.prepare_parameters
        )

    @dg.asset(**COMMON, ins=made_from("merged_dataset"))
    def dataset_profile(merged_dataset: PreparedDataset) -> DatasetProfile:
        return profile_dataset(merged_dataset, encoder=RecordEncoder.load(Path(base)))

    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(str(dataset_dates.name), [DATE])
        return dg.materialize(
            [merged_dataset, dataset_profile, asset.ensemble_adapter, combination_beats_best_member],
            partition_key=DATE,
            instance=instance,
            resources={
                "io_manager": ValueStore(directory=str(layout.asset_values)),
                "base_model": BaseModelSource(name=base, cache_dir=str(settings.data_root)),
                "run_log": RunLog(data_dir=str(settings.data_root)),
            },
            run_config={"ops": {"brain__ensemble_adapter": {"config": config}}},
        )


def test_the_asset_shows_the_members_and_whether_the_combination_is_better(
    root: Path, tiny_model: BaseModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data_root=root / "dagster", eval_fraction=0.4)
    monkeypatch.setattr(asset, "SETTINGS", settings)
    config = {
        "diversity": "folds",
        "n_members": 2,
        "combination": "ties",
        "weighting": "uniform",
        "fixed": FIXED,
        "tokens_per_second": 1000,
    }
    proposed = materialize(settings, str(tiny_model.path), {**config, "dry_run": True})
    (event,) = proposed.asset_materializations_for_node("brain__ensemble_adapter")
    assert event.metadata["status"].value == "dry_run"
    assert [row.data["steps"] for row in event.metadata["members"].value.records] == [4, 4]  # type: ignore[union-attr]
    assert float(event.metadata["gpu_hours"].value) > 0  # type: ignore[arg-type]
    assert not settings.layout.adapter("x").parent.exists()

    result = materialize(settings, str(tiny_model.path), config)
    (event,) = result.asset_materializations_for_node("brain__ensemble_adapter")
    told = event.metadata
    published = told["status"].value == "published"
    assert ("adapter" in told) == published
    assert str(told["losses"].value).startswith("![](data:image/png;base64,")
    assert "</html>" in Path(str(told["report"].value)).read_text()
    (check,) = result.get_asset_check_evaluations()
    assert check.passed == published
    assert check.severity == dg.AssetCheckSeverity.WARN
    assert check.description == told["reason"].value
    value = EnsembleResult.model_validate_json(
        (settings.layout.asset_values / "brain/ensemble_adapter" / f"{DATE}.json").read_bytes()
    )
    manifest = traced(Path(str(told["path"].value)), settings.layout)
    assert manifest.combinations[value.name].members == [member.run_id for member in value.members]
    assert manifest.figures["combination.judging_loss"].runs == [value.name]
    assert told["run_ids"].value == ", ".join(member.run_id for member in value.members)
    assert [member.fold for member in value.members] == [0, 1]
    assert len({member.dataset_fingerprint for member in value.members}) == 2


def test_each_ensemble_asks_for_a_gpu() -> None:
    wanted = asset.ensemble_adapter.op.tags["dagster-k8s/config"]
    assert json.loads(wanted)["container_config"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert asset.ensemble_adapter.op.pool == "gpu"


def command(directory: Path, tiny_model: BaseModelRef, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "DATA_ROOT": "data",
        "BASE_MODEL_NAME": str(tiny_model.path),
        "EVAL_FRACTION": "0.4",
        "GPU_HOUR_PRICE": "2",
    }
    return subprocess.Popen(
        arguments,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SPEC = f"""
goal: a killed one
dataset_path: records.jsonl
diversity: ranks
ranks: [2, 4]
combination: svd
weighting: uniform
tokens_per_second: 1000
fixed: {json.dumps({name: value for name, value in FIXED.items() if name != "lora_rank"} | {"max_steps": 8})}
"""


def test_an_ensemble_that_was_killed_in_a_training_goes_on_and_repeats_none(
    root: Path, tiny_model: BaseModelRef
) -> None:
    directory = root / "cli"
    records(directory / "records.jsonl")
    (directory / "spec.yaml").write_text(SPEC)
    code = (
        "import sys\n"
        "from lora_assets.cli.app import app\n"
        "app(['experiment', 'ensemble', 'spec.yaml', '--dry-run', '--json'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets', 'matplotlib'} & set(sys.modules)), "
        "file=sys.stderr)\n"
    )
    proposing = command(directory, tiny_model, sys.executable, "-c", code)
    output, errors = proposing.communicate()
    assert proposing.returncode == 0, errors
    assert errors.splitlines()[-1] == "[]"
    proposed = json.loads(output)
    assert proposed["status"] == "dry_run"
    assert [member["params"]["lora_rank"] for member in proposed["members"]] == [2, 4]
    assert all(member["price"] == pytest.approx(2 * member["gpu_hours"]) for member in proposed["members"])
    assert not (directory / "data" / "adapters").exists()

    arguments = [str(Path(__file__).with_name("killed_command.py")), "members: 1/2", "ensemble", "spec.yaml"]
    killed = command(directory, tiny_model, sys.executable, *arguments)
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    (first,) = (directory / "data" / "adapters" / "brain").glob("[!.]*")
    made = (first / "manifest.json").read_bytes()

    again = command(directory, tiny_model, *ENSEMBLE, "--json")
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    result = EnsembleResult.model_validate_json(output)
    assert result.members[0].run_id == first.name
    assert (first / "manifest.json").read_bytes() == made
    assert all(member.evaluated for member in result.members)
    assert (result.status == "published") == (result.adapter_path is not None)
    with_rows = RunLog(data_dir=str(directory / "data"))
    try:
        rows = {row.training_run_id: row for row in with_rows.recent()}
    finally:
        with_rows.close()
    assert {run_id: (row.status, row.attempts) for run_id, row in rows.items()} == {
        result.members[0].run_id: ("COMPLETED", 1),
        result.members[1].run_id: ("COMPLETED", 2),
    }
