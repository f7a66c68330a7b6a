"""Who is compared, who is exported, and what Ollama serves: the assets from the evaluation on, materialized."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
from pydantic import BaseModel

from finetune.adapter_files import WEIGHTS_NAME, adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import Counts, PreparedDataset
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.prepare import prepare_dataset
from finetune.evaluation.models import EvalReport
from finetune.export.models import GgufExport, GgufFile, GgufVerification
from finetune.planning.models import MemoryEstimate, TrainingPlan, TrialConfig
from finetune.progress import ignore_progress
from finetune.registry.models import RegisteredVersion
from finetune.registry.promotion import champion, promote
from finetune.registry.store import get_version, register_adapter
from finetune.training.models import TrainingResult
from lora_assets.assets import evaluation, export
from lora_assets.assets.common import key
from lora_assets.partitions import dataset_dates
from resources.artifact_store import ArtifactStore, ValueStore
from resources.base_model import BaseModelSource
from resources.ollama import OllamaServer
from tests.resources.ollama_server import FakeOllama

DATE = "2026-06-01"
BETTER, NO_BETTER = (-0.5, -0.4), (-0.0006, -0.0004)


PLAN = TrainingPlan(
    trial_config=TrialConfig(trial_id="t"),
    search_space={},
    memory_estimate=MemoryEstimate(vram_gb=0, fits=None, limit_gb=None, model_params=0, trainable_params=0, parts={}),
    explanations=[],
    estimated_steps=0,
    estimated_tokens=None,
)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(data_root=str(tmp_path), pipeline="brain")


def given(name: str, value: BaseModel) -> dg.AssetsDefinition:
    """An upstream asset that has this value."""

    @dg.asset(key=key(name), partitions_def=dataset_dates)
    def asset() -> Any:
        return value

    return asset


def run(store: ArtifactStore, tiny_model: BaseModelRef, *assets: Any, **options: Any) -> dg.ExecuteInProcessResult:
    """Run the last asset on the others."""
    host = options.pop("host", None)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(str(dataset_dates.name), [DATE])
        return dg.materialize(
            list(assets),
            instance=instance,
            partition_key=DATE,
            resources={
                "store": store,
                "io_manager": ValueStore(directory=str(store.layout.asset_values)),
                "base_model": base_of(store, tiny_model),
                "ollama": OllamaServer(host=host, timeout=60),
            },
            **options,
        )


def base_of(store: ArtifactStore, tiny_model: BaseModelRef) -> BaseModelSource:
    return BaseModelSource(name=str(tiny_model.path), cache_dir=str(store.layout.base_models))


def materialize(store: ArtifactStore, tiny_model: BaseModelRef, *assets: Any, **options: Any) -> dict[str, BaseModel]:
    """Run the last asset on the others; the values that it emitted by name."""
    result = run(store, tiny_model, *assets, **options)
    step = assets[-1].op.name
    made = [event.asset_key.path[-1] for event in result.get_asset_materialization_events() if event.step_key == step]
    return {name: result.output_for_node(step, name if len(assets) > 2 else "result") for name in made}


def register(
    store: ArtifactStore, tiny_model: BaseModelRef, number: int, interval: tuple[float, float], **config: Any
) -> dict[str, BaseModel]:
    """Put training number `number`, whose loss changed by this interval, through the registry."""
    from safetensors.numpy import save_file

    directory = store.layout.adapter(f"run{number}")
    if not directory.exists():
        directory.mkdir(parents=True)
        save_file({"a": np.full(4, number, np.float32)}, directory / WEIGHTS_NAME)
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    digest = adapter_hash(directory)
    report = EvalReport(
        path=directory,
        run_id=f"run{number}",
        eval_loss=2.0 + interval[0],
        eval_perplexity=1.0,
        base_loss=2.0,
        base_perplexity=1.0,
        delta_vs_base_loss=interval[0],
        delta_ci95=interval,
        token_accuracy=0.5,
        base_token_accuracy=0.5,
        exact_match=None,
        base_exact_match=None,
        records=10,
        tokens=100,
        seconds=1.0,
        answers=[],
        base_fingerprint="base",
        adapter_hash=digest,
    )
    trained = TrainingResult(
        status="completed",
        run_id=f"run{number}",
        backend="hf-peft",
        adapter_path=directory,
        adapter_hash=digest,
        training_steps=1,
        gpu_hours=0,
        final_loss=1.0,
    )
    prepared = PreparedDataset(
        path=directory,
        date=DATE,
        fingerprint="f" * 64,
        window_dates=[DATE],
        counts=Counts(lines=1, train=1, eval=0, duplicates=0, rejected=0, blank=0),
        rejects_by_reason={},
        rejects_by_file={},
    )
    return materialize(
        store,
        tiny_model,
        given("adapter", trained),
        given("eval_report", report),
        given("merged_dataset", prepared),
        given("training_plan", PLAN),
        evaluation.registered_adapter,
        run_config={"ops": {"registered_adapter": {"config": config}}},
    )


def trained(store: ArtifactStore, tiny_model: BaseModelRef, seed: int) -> TrainingResult:
    """An adapter with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    directory = store.layout.adapter(f"run{seed}")
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path)
    get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).save_pretrained(directory)
    return TrainingResult(
        status="completed",
        run_id=f"run{seed}",
        backend="hf-peft",
        adapter_path=directory,
        adapter_hash=adapter_hash(directory),
        training_steps=1,
        gpu_hours=0,
        final_loss=1.0,
    )


def test_the_champion_is_not_compared_on_prompts_that_it_was_trained_on(
    store: ArtifactStore, tiny_model: BaseModelRef
) -> None:
    """More is held out today than when the champion was trained."""
    layout = store.layout
    layout.exports.mkdir(parents=True)
    rows = ({"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(40))
    (layout.exports / f"brain_dataset_{DATE}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = discover_exports(layout.exports)
    before, now = (
        prepare_dataset(files, date=DATE, layout=layout, parameters=PrepareParameters(eval_fraction=fraction))
        for fraction in (0.2, 0.5)
    )
    first, candidate = (trained(store, tiny_model, seed) for seed in (1, 2))
    version = register_adapter(
        layout.registry,
        adapter_path=first.adapter_path,
        adapter_hash=first.adapter_hash,
        trial_id="t",
        run_id=first.run_id,
        metrics={},
        tags={},
        lineage={
            "date": DATE,
            "dataset_fingerprint": before.fingerprint,
            "base_model_fingerprint": base_of(store, tiny_model).resolve(ignore_progress).fingerprint,
        },
    )
    promote(layout.registry, version.version, reason="the first", by="test")
    result = run(
        store,
        tiny_model,
        given("adapter", candidate),
        given("merged_dataset", now),
        given("training_plan", PLAN),
        evaluation.eval_report,
    )
    report = result.output_for_node(evaluation.eval_report.op.name)
    assert isinstance(report, EvalReport)
    assert report.champion is not None
    known = set(before.train_path.read_bytes().splitlines())
    assert report.records == now.counts.eval
    assert report.champion.left_out == len(known & set(now.eval_path.read_bytes().splitlines())) > 0
    (told,) = result.asset_materializations_for_node(evaluation.eval_report.op.name)
    change = f"v1: {report.champion.delta_vs_champion:+.4f}"
    assert told.metadata["against_champion"].value == f"{change}; {report.champion.caveat}"
    assert report.champion.caveat.startswith(
        f"left out of the comparison: {report.champion.left_out} of the held-out records"
    )


def reigns(store: ArtifactStore) -> str | None:
    found = champion(store.layout.registry)
    return None if found is None else found.version


def exported(made: dict[str, BaseModel]) -> str:
    version = made["promoted_adapter"]
    assert isinstance(version, RegisteredVersion)
    return version.version


def test_the_champion_or_the_named_version_is_exported_and_nothing_else(
    store: ArtifactStore, tiny_model: BaseModelRef
) -> None:
    assert exported(register(store, tiny_model, 1, BETTER)) == "v1"
    challenger = register(store, tiny_model, 2, NO_BETTER)
    assert challenger.keys() == {"registered_adapter"}
    assert exported(register(store, tiny_model, 2, NO_BETTER, export_version="v1")) == "v1"
    assert reigns(store) == "v1"
    assert exported(register(store, tiny_model, 2, NO_BETTER, promote=True)) == "v2"
    assert reigns(store) == "v2"
    assert register(store, tiny_model, 1, BETTER).keys() == {"registered_adapter"}, "it reigned before"
    with pytest.raises(Exception, match="no version v9"):
        register(store, tiny_model, 1, BETTER, export_version="v9")


def test_an_adapter_that_learned_nothing_makes_no_first_champion(
    store: ArtifactStore, tiny_model: BaseModelRef
) -> None:
    made = register(store, tiny_model, 1, NO_BETTER)
    assert made.keys() == {"registered_adapter"}
    version = made["registered_adapter"]
    assert isinstance(version, RegisteredVersion)
    assert "by at least 0.001 nats per token" in version.reason
    assert reigns(store) is None


def test_a_date_that_other_settings_give_the_same_adapter_is_made_of_these(
    store: ArtifactStore, tiny_model: BaseModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would be stale for ever: the version keeps what it was first made of."""
    register(store, tiny_model, 1, BETTER)
    later = evaluation.SETTINGS.model_copy(update={"init_from": "champion"})
    assert later.recipe != evaluation.SETTINGS.recipe
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "SETTINGS", later)
        made = register(store, tiny_model, 1, BETTER)["registered_adapter"]
    assert isinstance(made, RegisteredVersion)
    assert (made.version, made.lineage["recipe"]) == ("v1", later.recipe)
    assert get_version(store.layout.registry, "v1").lineage["recipe"] == evaluation.SETTINGS.recipe


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with FakeOllama() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def create_on(server: FakeOllama, store: ArtifactStore, tiny_model: BaseModelRef, number: int) -> None:
    """Export training number `number` to the server."""
    directory = store.layout.model(f"run{number}", "gguf")
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in ("full", "quantized", "base", "adapter"):
        path = directory / f"{name}.gguf"
        path.write_bytes(f"GGUF {name} {number}".encode())
        files[name] = GgufFile(path=path, quantization="F16", size=path.stat().st_size, sha256=f"{name}{number}")
    checked = GgufVerification(
        tokenization_equal=True, prompts=1, greedy_agreement={}, sample_question="", sample_answer="", base_answer=""
    )
    gguf = GgufExport(path=directory, run_id=f"run{number}", verification=checked, seconds=1.0, **files)
    materialize(store, tiny_model, given("gguf", gguf), export.modelfile, host=server.address)


def test_a_run_that_exports_the_champion_moves_the_served_tag_and_one_of_another_version_does_not(
    server: FakeOllama, store: ArtifactStore, tiny_model: BaseModelRef
) -> None:
    for number in (1, 2, 3):
        register(store, tiny_model, number, NO_BETTER)
    promote(store.layout.registry, "v1", reason="for the test", by="test")
    create_on(server, store, tiny_model, 1)
    first = server.models["predator-v21:run1"]
    assert server.models["predator-v21:champion"] == first
    create_on(server, store, tiny_model, 3)
    assert server.models["predator-v21:champion"] == first
    promote(store.layout.registry, "v2", reason="for the test", by="test")
    create_on(server, store, tiny_model, 2)
    assert server.models["predator-v21:champion"] == server.models["predator-v21:run2"] != first
