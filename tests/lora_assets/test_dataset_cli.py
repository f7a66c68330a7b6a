"""`lora-assets dataset`: what the assets do, for any directory, and as JSON for machines."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from typer.testing import CliRunner

from finetune.adapter_files import WEIGHTS_NAME, adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.layout import DataLayout
from finetune.registry.store import register_adapter
from lora_assets.assets import dataset
from lora_assets.cli.app import app
from lora_assets.partitions import dataset_dates
from lora_assets.settings import Settings
from resources.artifact_store import ArtifactStore, ValueStore
from resources.base_model import BaseModelSource

DATE = "2026-06-02"
FILES = {
    "brain_dataset_2026-06-01.jsonl": "".join(f'{{"id":{n},"text":"record {n}"}}\n' for n in range(40)) + "{bad\n[]\n",
    f"brain_dataset_{DATE}.jsonl": "".join(f'{{"prompt":"q {n}","completion":"так {n}"}}\n' for n in range(9)) + "{no",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    exports = tmp_path / "datasets" / "brain"
    exports.mkdir(parents=True)
    for name, content in FILES.items():
        (exports / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "unused"))
    return tmp_path


def invoke(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["dataset", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def materialized(monkeypatch: pytest.MonkeyPatch, root: Path, model: BaseModelRef) -> dict[str, dict[str, Any]]:
    """The metadata of `merged_dataset` and `dataset_profile`."""
    monkeypatch.setattr(dataset, "SETTINGS", Settings(data_root=root))
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(str(dataset_dates.name), [DATE])
        result = dg.materialize(
            [dataset.merged_dataset, dataset.dataset_profile],
            instance=instance,
            partition_key=DATE,
            resources={
                "store": ArtifactStore(data_root=str(root), pipeline="brain"),
                "base_model": BaseModelSource(name=str(model.path), cache_dir=str(root / "base_models")),
                "io_manager": ValueStore(directory=str(root / "assets")),
            },
        )
    return {
        event.materialization.asset_key.path[-1]: {
            name: value.value for name, value in event.materialization.metadata.items()
        }
        for event in result.get_asset_materialization_events()
    }


def rows(metadata: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [record.data for record in metadata[name].records]


def test_the_command_and_the_assets_prepare_and_profile_the_same(
    monkeypatch: pytest.MonkeyPatch, root: Path, tiny_model: BaseModelRef
) -> None:
    told = invoke("prepare", root / "datasets" / "brain", root / "out", "--workers", 2)
    again = invoke("prepare", root / "datasets" / "brain", root / "out")
    profile = invoke("analyze", told["path"], "--tokenizer", tiny_model.path)
    assets = materialized(monkeypatch, root, tiny_model)
    merged, shown = assets["merged_dataset"], assets["dataset_profile"]

    assert (told["reused"], again["reused"], again["path"]) == (False, True, told["path"])
    made = Path(merged["path"])
    assert made.is_relative_to(root / "prepared")
    for name in ("train.jsonl", "eval.jsonl", "rejects.jsonl"):
        assert (made / name).read_bytes() == (Path(told["path"]) / name).read_bytes()
    assert rows(merged, "rejects_by_reason") == [
        {"reason": reason, "lines": 1} for reason in ("bad_json", "half_line", "not_an_object")
    ]
    assert rows(merged, "rejects_by_file") == [
        {"file": name, "lines": lines} for name, lines in zip(FILES, (2, 1), strict=True)
    ]
    assert told["rejects_by_file"] == {row["file"]: row["lines"] for row in rows(merged, "rejects_by_file")}
    for name in ("total_samples", "format_detected", "has_instruction", "has_output", "avg_tokens", "max_tokens"):
        assert profile[name] == shown[name]
    for name in ("total_tokens", "duplicates_found", "trained_token_share", "tokenized_by"):
        assert profile[name] == shown[name]
    assert ", ".join(profile["columns"]) == shown["columns"]
    assert {row["percentile"]: row["tokens"] for row in rows(shown, "percentiles")} == profile["percentiles"]
    assert rows(shown, "truncation") == profile["truncation"]
    assert rows(shown, "longest") == [{**row, "id": row["id"] or ""} for row in profile["longest"]]
    assert {row["script"]: row["share"] for row in rows(shown, "scripts")} == profile["script_shares"]
    assert {row["file"]: row["records"] for row in rows(shown, "records_per_file")} == profile["records_per_file"]
    assert "data:image/png;base64," in shown["token_histogram"]


def test_a_date_is_a_day_and_nothing_later_is_trained_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = root / "datasets" / "brain", root / "out"
    for date in ("2026-06-01", "20260601"):
        told = invoke("prepare", source, output, "--date", date)
        assert (told["date"], told["window_dates"]) == ("2026-06-01", ["2026-06-01"])
    for date in ("2026-6-1", "2026-06-31", "yesterday"):
        refused = CliRunner().invoke(app, ["dataset", "prepare", str(source), str(output), "--date", date])
        assert refused.exit_code == 1
        assert f"--date {date} is no date" in " ".join(refused.output.split())
    assert [path.name for path in (output / "prepared" / "brain").glob("[!.]*")] == ["2026-06-01"]
    assert invoke("prepare", source, output)["window_dates"] == ["2026-06-01", DATE]
    monkeypatch.setenv("DATASET_WINDOW", "date")
    assert invoke("prepare", source, output)["window_dates"] == [DATE]


def test_no_size_of_sample_changes_a_figure(root: Path, tiny_model: BaseModelRef) -> None:
    path = root / "long.jsonl"
    records = [{"prompt": f"q {n}", "completion": "слово"} for n in range(1100)]
    records[-1]["completion"] *= 50
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    small, large = (
        invoke("analyze", path, "--format", "jsonl", "--tokenizer", tiny_model.path, "--sample-size", size)
        for size in (1, 10**6)
    )

    # The longest is beyond any sample.
    [longest] = RecordEncoder.load(tiny_model.path).encode(records[-1:])
    told = {name: (small.pop(name), large.pop(name)) for name in ("tokens_compared", "tokens_differ_at_most")}
    assert told == {"tokens_compared": (1024, 1100), "tokens_differ_at_most": (3 / 1024, 0.0)}
    assert small == large
    assert small["max_tokens"] == len(longest.input_ids)
    assert small["longest"][0]["where"] == "long.jsonl:1100"


def test_versions_are_listed_that_learned_a_duplicate_of_what_is_deleted_or_went_on_from_one_that_did(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    monkeypatch.setenv("DATA_ROOT", str(root))
    layout = DataLayout(root)
    export = layout.exports / f"brain_dataset_{DATE}.jsonl"
    # Not the id of the record that was kept, but of an equal one in another export.
    export.write_text(export.read_text() + "".join(f'\n{{"id":"again-{n}","text":"record  {n}"}}' for n in range(40)))
    told = invoke("prepare", layout.exports, root)
    learned = json.loads(Path(told["path"], "train.jsonl").read_text().partition("\n")[0])
    lineages: list[dict[str, Any]] = [
        {"dataset_fingerprint": told["fingerprint"]},
        {"dataset_fingerprint": "other"},
        {"dataset_fingerprint": "other", "continued": {"version": "v1"}},
    ]
    for number, lineage in enumerate(lineages):
        adapter = root / f"adapter-{number}"
        adapter.mkdir()
        save_file({"a": np.full(9, number, np.float32)}, adapter / WEIGHTS_NAME)
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        register_adapter(
            layout.registry,
            adapter_path=adapter,
            adapter_hash=adapter_hash(adapter),
            trial_id="t",
            run_id=f"run{number}",
            metrics={},
            tags={},
            lineage=lineage,
        )
    entries = root / "deletions.txt"
    entries.write_text(f"again-{learned['id']}\n")

    found = invoke("deletions", "--list", entries)

    assert found["versions"] == ["v1", "v3"]
    [dataset] = found["datasets"]
    assert (dataset["path"], dataset["train_lines"], dataset["versions"]) == (told["path"], [1], ["v1"])
    # Whatever is prepared from now on does not hold it.
    monkeypatch.setenv("DELETION_LIST", str(entries))
    after = invoke("prepare", layout.exports, root)
    assert after["counts"]["removed"] == 2
    assert json.dumps(learned, separators=(",", ":")) not in Path(after["path"], "train.jsonl").read_text()
    assert json.dumps(learned, separators=(",", ":")) in Path(told["path"], "train.jsonl").read_text()
