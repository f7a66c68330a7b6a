"""Two real trainings on exports: one from the base model, one that begins with its adapter; both are versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import PreparedDataset
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.prepare import prepare_dataset
from finetune.layout import DataLayout
from finetune.planning.models import MemoryEstimate, TrainingPlan, TrialConfig
from finetune.registry.store import register_adapter
from finetune.reproduction.at_hand import Places
from finetune.training.identity import training_run_id
from finetune.training.init_adapter import read_init_adapter
from finetune.training.models import InitAdapter, TrainingRequest, TrainingResult

DATE = "2026-06-08"


@dataclass(frozen=True)
class Published:
    """A data root on which two versions were made."""

    layout: DataLayout
    first: Path
    second: Path
    trainings: list[TrainingResult]
    evaluation: Path

    @property
    def places(self) -> Places:
        return Places(layout=self.layout, exports=self.layout.exports)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slower with two threads, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_exports(directory: Path) -> None:
    directory.mkdir(parents=True)
    for day, count in (("2026-06-01", 20), (DATE, 24)):
        records = [{"instruction": f"Question {i} of {day}?", "output": f"Answer {i}."} for i in range(count)]
        lines = [json.dumps(record) + "\n" for record in records]
        (directory / f"brain_dataset_{day}.jsonl").write_text("".join(lines))


def plan_of(seed: int) -> TrainingPlan:
    return TrainingPlan(
        trial_config=TrialConfig(
            trial_id="t",
            lora_rank=2,
            target_modules=["q_proj"],
            learning_rate=1e-3,
            micro_batch=2,
            accumulation=1,
            max_steps=6,
            max_length=48,
            seed=seed,
        ),
        search_space={},
        memory_estimate=MemoryEstimate(
            vram_gb=0, fits=None, limit_gb=None, model_params=0, trainable_params=0, parts={}
        ),
        explanations=[],
        estimated_steps=3,
        estimated_tokens=None,
    )


def request_of(
    layout: DataLayout, dataset: PreparedDataset, base: BaseModelRef, seed: int, init: InitAdapter | None = None
) -> TrainingRequest:
    plan = plan_of(seed)
    run_id = training_run_id(
        date=DATE,
        dataset_fingerprint=dataset.fingerprint,
        trial=plan.trial_config,
        base_model=base,
        backend="hf-peft",
        init_adapter=init.adapter_hash if init else None,
    )
    return TrainingRequest(
        run_id=run_id,
        date=DATE,
        dataset=dataset,
        plan=plan,
        base_model=base,
        adapter_dir=layout.adapter(run_id),
        work_dir=layout.work(run_id),
        init_adapter=init,
        checkpoint_seconds=0,
        processes=1,
    )


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_model: BaseModelRef) -> Published:
    from finetune.evaluation.evaluate import evaluate_adapter
    from finetune.training.sft import train_adapter

    layout = DataLayout(tmp_path_factory.mktemp("published") / "root")
    write_exports(layout.exports)
    dataset = prepare_dataset(
        discover_exports(layout.exports), date=DATE, layout=layout, parameters=PrepareParameters(eval_fraction=0.3)
    )
    results: list[TrainingResult] = []
    versions: list[Path] = []
    evaluation = layout.root
    init = None
    for seed in (7, 8):
        request = request_of(layout, dataset, tiny_model, seed, init)
        result = train_adapter(request)
        evaluation = layout.model(request.run_id, "evaluation")
        report = evaluate_adapter(
            base_model=tiny_model,
            adapter_path=request.adapter_dir,
            dataset=dataset.eval_path,
            output_dir=evaluation,
            run_id=request.run_id,
            max_length=48,
            sample_answers=0,
        )
        version = register_adapter(
            layout.registry,
            adapter_path=request.adapter_dir,
            adapter_hash=report.adapter_hash,
            trial_id="t",
            run_id=request.run_id,
            metrics={"eval_loss": report.eval_loss, "base_loss": report.base_loss},
            tags={},
            lineage={"dataset_fingerprint": dataset.fingerprint},
            evaluations=[evaluation],
            exports=layout.exports,
            environment={"SEED": str(seed)},
        )
        results.append(result)
        versions.append(version.stored_path)
        init = read_init_adapter(request.adapter_dir)
    return Published(layout, versions[0], versions[1], results, evaluation)
