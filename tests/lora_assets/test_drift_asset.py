"""The champion's drift as asset and check, on real exports, a real registry and the embedded model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune.adapter_files import adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.base_model.resolve import resolve_base_model
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import PreparedDataset
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.prepare import prepare_dataset
from finetune.evaluation.drift import DriftReport
from finetune.registry.promotion import promote
from finetune.registry.store import register_adapter
from lora_assets.assets import drift
from lora_assets.settings import load_settings
from resources.artifact_store import ArtifactStore, ValueStore
from resources.base_model import BaseModelSource

Evaluate = Callable[[], dg.ExecuteInProcessResult]


@pytest.fixture
def evaluate(tiny_model: BaseModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Materializes the report and its check under a data root of their own."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    settings = load_settings()
    monkeypatch.setattr(drift, "SETTINGS", settings)
    settings.exports.mkdir(parents=True)
    store = ArtifactStore(data_root=str(tmp_path), pipeline="brain")

    def materialize() -> dg.ExecuteInProcessResult:
        with dg.DagsterInstance.ephemeral() as instance:
            return dg.materialize(
                [drift.drift_report, drift.champion_drift],
                instance=instance,
                raise_on_error=False,
                resources={
                    "store": store,
                    "io_manager": ValueStore(directory=str(store.layout.asset_values)),
                    "base_model": BaseModelSource(name=str(tiny_model.path), cache_dir=str(store.layout.base_models)),
                },
            )

    return materialize


def export(root: Path, date: str, *records: dict[str, str]) -> None:
    path = root / "datasets" / "brain" / f"brain_dataset_{date}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def crown(
    root: Path, base: BaseModelRef, run: str = "run1", *, on: str = "2026-06-01", window: str = "all", **lineage: Any
) -> PreparedDataset:
    """Make an adapter that changes nothing champion of what lies there; returns its dataset."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    store = ArtifactStore(data_root=str(root), pipeline="brain")
    prepared = prepare_dataset(
        discover_exports(store.layout.exports),
        date=on,
        layout=store.layout,
        parameters=PrepareParameters(window=window),
    )
    path = store.layout.adapter(run)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), config).save_pretrained(path)
    version = register_adapter(
        store.layout.registry,
        adapter_path=path,
        adapter_hash=adapter_hash(path),
        trial_id="t",
        run_id=run,
        metrics={},
        tags={},
        lineage={
            "date": on,
            "dataset_fingerprint": prepared.fingerprint,
            "plan": {"max_length": 128},
            "base_model_fingerprint": resolve_base_model(
                str(base.path), cache_dir=store.layout.base_models
            ).fingerprint,
            **lineage,
        },
    )
    promote(store.layout.registry, version.version, reason="test", by="test")
    return prepared


def check_of(result: dg.ExecuteInProcessResult) -> Any:
    assert result.success
    [check] = result.get_asset_check_evaluations()
    return check


def test_new_data_that_the_champion_does_not_know_raises_the_check(
    evaluate: Evaluate, tmp_path: Path, tiny_model: BaseModelRef
) -> None:
    export(tmp_path, "2026-06-01", *({"prompt": f"Colour {n}?", "completion": f"It is {n}."} for n in range(150)))
    crown(tmp_path, tiny_model)
    quiet = check_of(evaluate())
    assert (quiet.passed, quiet.description) == (True, "no held-out data has arrived since its training")

    export(
        tmp_path, "2026-06-09", *({"prompt": f"Q{n}?", "completion": f"zx{n * 7919}q vb {n}!" * 3} for n in range(150))
    )
    told = check_of(evaluate())
    assert not told.passed
    assert told.severity == dg.AssetCheckSeverity.WARN
    assert "v1: loss" in told.description
    assert "95 % between" in told.description
    assert "at most +0.1 (DRIFT_TOLERANCE)" in told.description


def test_what_a_version_learned_from_which_the_champion_went_on_is_not_new(
    evaluate: Evaluate, tmp_path: Path, tiny_model: BaseModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in ("2026-06-01", "2026-06-02"):
        export(tmp_path, day, *({"prompt": f"Colour {n} of {day}?", "completion": f"It is {n}."} for n in range(40)))
    ancestor = crown(tmp_path, tiny_model)
    crown(tmp_path, tiny_model, "run2", on="2026-06-02", window="date", continued={"version": "v1"})
    # More is held out now: some of what both were trained on.
    monkeypatch.setenv("EVAL_FRACTION", "0.5")
    monkeypatch.setattr(drift, "SETTINGS", load_settings())

    def measured() -> tuple[DriftReport, set[str]]:
        result = evaluate()
        report = result.output_for_node("brain__drift_report")
        return report, {json.loads(line)["prompt"] for line in (report.path / "new.jsonl").read_text().splitlines()}

    learned = {json.loads(line)["prompt"] for line in ancestor.train_path.read_text().splitlines()}
    report, new = measured()
    assert (report.version, report.unknown) == ("v2", [])
    assert not new & learned
    shutil.rmtree(ancestor.path)
    report, new = measured()
    assert report.unknown == ["v1"]
    assert new & learned, "which the champion's own dataset does not hold"
    assert "the dataset of v1 is gone or damaged" in (check_of(evaluate()).description or "")


def test_without_a_champion_the_reason_is_told_and_nothing_is_tried_again(evaluate: Evaluate) -> None:
    result = evaluate()
    assert not result.success
    [failed] = [event for event in result.all_events if event.is_step_failure]
    assert "no version reigns yet" in str(failed.step_failure_data)
    assert not [event for event in result.all_events if event.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY]


REPORT = DriftReport(
    path=Path(),
    version="v3",
    adapter_hash="a",
    known_records=50,
    known_loss=1.0,
    records=50,
    loss=1.3,
    drift=0.3,
    drift_ci95=(0.2, 0.4),
    base_loss=2.0,
    base_drift=0.0,
    delta_vs_base_loss=-0.7,
    delta_ci95=(-0.8, -0.6),
)


@pytest.mark.parametrize(
    ("change", "passed", "severity"),
    [
        ({}, False, "WARN"),
        ({"drift_ci95": (0.05, 0.55)}, True, "WARN"),
        ({"delta_ci95": (0.1, 0.2)}, False, "ERROR"),
        ({"drift_ci95": (-0.1, 0.1), "delta_ci95": (0.1, 0.2)}, False, "ERROR"),
        ({"records": 5}, True, "WARN"),
        ({"known_records": 5}, True, "WARN"),
    ],
    ids=["beyond tolerance", "not beyond chance", "worse than the base", "useless from the start", "few", "few before"],
)
def test_when_the_check_fails(change: dict[str, Any], passed: bool, severity: str) -> None:
    result = drift.champion_drift(REPORT.model_copy(update=change))
    assert isinstance(result, dg.AssetCheckResult)
    assert (result.passed, result.severity.value) == (passed, severity)
