"""Each gate passes on what the demo made, and fails when its artifact is damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune.dataset.models import PreparedDataset
from finetune.evaluation.models import EvalReport
from finetune.export.models import GgufExport, MergedModel
from finetune.registry.models import RegisteredVersion
from finetune.training.models import TrainingResult
from lora_assets import checks
from resources.artifact_store import ArtifactStore
from resources.base_model import BaseModelSource
from tests.e2e.conftest import DATES, Loop

pytestmark = pytest.mark.e2e
NEWEST = DATES[-1]


@pytest.fixture
def copied(demo: Loop, tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a directory out of the demo's data root, to be damaged."""

    def copy(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / directory.name))

    return copy


@pytest.fixture
def base_model(demo: Loop) -> BaseModelSource:
    return BaseModelSource(cache_dir=str(demo.layout.base_models))


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


def run(check: Any, **inputs: Any) -> dg.AssetCheckResult:
    result = check(**inputs)
    assert isinstance(result, dg.AssetCheckResult)
    assert result.description or result.passed
    return result


@pytest.fixture
def prepared(demo: Loop, copied: Callable[[Path], Path]) -> PreparedDataset:
    original = demo.value("merged_dataset", NEWEST, PreparedDataset)
    return original.model_copy(update={"path": copied(original.path)})


def test_a_whole_dataset_passes_and_an_altered_or_empty_one_fails(prepared: PreparedDataset) -> None:
    check = checks.dataset_whole_and_not_empty
    assert run(check, merged_dataset=prepared).passed
    flip_last_byte(prepared.train_path)
    altered = run(check, merged_dataset=prepared)
    assert not altered.passed
    assert "train.jsonl" in str(altered.description)
    prepared.eval_path.write_bytes(b"")
    assert not run(check, merged_dataset=prepared).passed


def test_too_many_rejects_fail(prepared: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    check = checks.reject_rate_under_threshold
    monkeypatch.setattr(checks, "SETTINGS", checks.SETTINGS.model_copy(update={"max_reject_rate": 0.2}))
    assert run(check, merged_dataset=prepared).passed
    with prepared.rejects_path.open("ab") as rejects:
        rejects.write(b"{}\n" * 200)
    failed = run(check, merged_dataset=prepared)
    assert not failed.passed
    assert "MAX_REJECT_RATE" in str(failed.description)


def test_a_prompt_on_both_sides_fails_even_if_it_is_written_otherwise(prepared: PreparedDataset) -> None:
    check = checks.no_prompt_on_both_sides
    assert run(check, merged_dataset=prepared).passed
    with prepared.train_path.open("ab") as train, prepared.eval_path.open("ab") as held_out:
        train.write(b'{"prompt": "Where   is it?", "completion": "there"}\n')
        held_out.write(b'{"instruction": "Where is it? ", "output": "here"}\n')
    leaked = run(check, merged_dataset=prepared)
    assert not leaked.passed
    assert "Where is it?" in str(leaked.description)


def store_at(root: Path) -> ArtifactStore:
    return ArtifactStore(data_root=str(root), pipeline="brain")


def test_an_altered_adapter_or_one_with_nan_fails(demo: Loop, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    check = checks.adapter_whole_and_finite
    adapter = demo.value("adapter", NEWEST, TrainingResult)
    store = store_at(tmp_path)
    target = store.layout.adapter(adapter.run_id)
    shutil.copytree(demo.layout.adapter(adapter.run_id), target)
    assert run(check, adapter=adapter, store=store).passed
    weights_path = target / "adapter_model.safetensors"
    weights = load_file(weights_path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = torch.nan
    weights_path.unlink()
    save_file(weights, weights_path, metadata={"format": "pt"})
    altered = run(check, adapter=adapter, store=store)
    assert not altered.passed
    (target / "manifest.json").unlink()
    assert not run(check, adapter=adapter, store=store).passed


def test_nan_is_found_behind_a_manifest_that_agrees(demo: Loop, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from finetune.publishing import publish_directory

    adapter = demo.value("adapter", NEWEST, TrainingResult)
    weights = load_file(demo.layout.adapter(adapter.run_id) / "adapter_model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = torch.inf
    store = store_at(tmp_path)
    with publish_directory(store.layout.adapter(adapter.run_id), kind="adapter") as staging:
        save_file(weights, staging.path / "adapter_model.safetensors")
    failed = run(checks.adapter_whole_and_finite, adapter=adapter, store=store)
    assert not failed.passed
    assert name in str(failed.description)


def test_an_adapter_that_does_not_beat_its_base_is_reported(demo: Loop) -> None:
    check = checks.adapter_beats_base
    report = demo.value("eval_report", NEWEST, EvalReport)
    assert run(check, eval_report=report).passed
    worse = report.model_copy(update={"eval_loss": 9.0, "delta_vs_base_loss": 5.0, "delta_ci95": (4.0, 6.0)})
    failed = run(check, eval_report=worse)
    assert not failed.passed
    assert failed.severity == dg.AssetCheckSeverity.WARN


def test_a_version_with_a_flipped_byte_fails(demo: Loop, tmp_path: Path) -> None:
    check = checks.version_unaltered
    version = demo.value("registered_adapter", NEWEST, RegisteredVersion)
    store = store_at(tmp_path)
    # The registry may link files; a copy must not share their bytes.
    shutil.copytree(demo.layout.registry, store.layout.registry)
    assert run(check, registered_adapter=version, store=store).passed
    flip_last_byte(store.layout.registry / version.version / "adapter_model.safetensors")
    failed = run(check, registered_adapter=version, store=store)
    assert not failed.passed
    assert "adapter_model.safetensors" in str(failed.description)


def test_a_merged_model_with_one_altered_tensor_fails(
    demo: Loop, copied: Callable[[Path], Path], base_model: BaseModelSource, prepared: PreparedDataset
) -> None:
    from safetensors.torch import load_file, save_file

    original = demo.value("merged_model", NEWEST, MergedModel)
    merged = original.model_copy(update={"path": copied(original.path)})
    inputs = {
        "context": dg.build_asset_check_context(),
        "promoted_adapter": demo.value("promoted_adapter", NEWEST, RegisteredVersion),
        "merged_dataset": prepared,
        "base_model": base_model,
    }
    check = checks.merged_equals_base_plus_adapter
    assert run(check, merged_model=merged, **inputs).passed
    weights_path = merged.path / "model.safetensors"
    weights = load_file(weights_path)
    weights["model.layers.1.mlp.down_proj.weight"].mul_(1.5)
    weights_path.unlink()
    save_file(weights, weights_path, metadata={"format": "pt"})
    failed = run(check, merged_model=merged, **inputs)
    assert not failed.passed
    assert "layer" in str(failed.description)


def test_a_gguf_with_altered_bytes_or_cut_short_fails(
    demo: Loop, copied: Callable[[Path], Path], prepared: PreparedDataset
) -> None:
    original = demo.value("gguf", NEWEST, GgufExport)
    directory = copied(original.path)
    moved = {
        name: file.model_copy(update={"path": directory / file.path.name})
        for name in ("full", "quantized", "adapter")
        if (file := getattr(original, name)).path.is_relative_to(original.path)
    }
    gguf = original.model_copy(update={"path": directory, **moved})
    inputs = {
        "context": dg.build_asset_check_context(),
        "merged_model": demo.value("merged_model", NEWEST, MergedModel),
        "merged_dataset": prepared,
    }
    check = checks.gguf_answers_like_merged_model
    passed = run(check, gguf=gguf, **inputs)
    assert passed.passed, passed.description
    flip_last_byte(gguf.quantized.path)
    altered = run(check, gguf=gguf, **inputs)
    assert not altered.passed
    assert gguf.quantized.path.name in str(altered.description)


def test_a_failing_gate_stops_what_is_downstream(demo: Loop, loop: Loop) -> None:
    loop.layout.exports.mkdir(parents=True)
    for file in demo.layout.exports.glob(f"*{DATES[0]}*"):
        shutil.copy(file, loop.layout.exports)
    done = loop.run("run", "--json", MAX_REJECT_RATE="0.001")
    assert done.returncode == 1
    assert "reject_rate_under_threshold" in done.stderr
    assert "MAX_REJECT_RATE" in done.stderr
    assert "Traceback" not in done.stderr
    made = {path.name for path in (loop.layout.asset_values / "brain").iterdir()}
    assert made == {"merged_dataset"}
    assert not loop.layout.root.joinpath("adapters").exists()


def test_a_challenger_is_a_success_that_exports_nothing(demo: Loop, loop: Loop) -> None:
    shutil.rmtree(loop.root)
    shutil.copytree(demo.root, loop.root, symlinks=True, ignore=shutil.ignore_patterns("postgres"))
    hopeless = {"LEARNING_RATE": "1e-9", "TRAIN_EPOCHS": "1"}
    (outcome,) = loop.run_json("run", "--date", DATES[0], **hopeless)["runs"]
    assert outcome["status"] == "SUCCESS"
    made = [step["asset"] for step in outcome["steps"]]
    assert "registered_adapter" in made
    assert not {"promoted_adapter", "merged_model", "gguf", "modelfile", "lmstudio_export"} & set(made)
    version = loop.value("registered_adapter", DATES[0], RegisteredVersion)
    assert (version.version, version.status) == ("v4", "challenger")
    assert "not shown to be better by at least 0.001 nats per token than the" in version.reason
    assert not (loop.root / "models" / version.run_id / "gguf").exists()
    states = {state["date"]: state["state"] for state in loop.run_json("run", "--dry-run", **hopeless)["dates"]}
    assert states[DATES[0]] == "current", "a challenger is not trained again and again"
