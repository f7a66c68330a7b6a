"""A request as the asset makes it, and a client in a hurry to send it."""

from pathlib import Path

from finetune.base_model.models import BaseModelRef
from finetune.dataset.models import Counts, PreparedDataset
from finetune.planning.models import MemoryEstimate, TrainingPlan, TrialConfig
from finetune.progress import ProgressEvent
from finetune.training.models import TrainingRequest, TrainingResult
from resources.h2o.protocol import Limits, Timing
from resources.h2o_trainer import H2OTrainer
from tests.resources.h2o_server import KEY, H2OServer

FAST = {
    "connect_timeout": 2,
    "read_timeout": 2,
    "answer_timeout": 2,
    "poll": 0.005,
    "poll_ceiling": 0.02,
    "retry": 0.01,
    "retry_ceiling": 0.05,
    "retry_budget": 3,
    "stalled": 20,
    "total": 60,
}


def request_in(root: Path) -> TrainingRequest:
    prepared = root / "prepared"
    prepared.mkdir(exist_ok=True)
    (prepared / "train.jsonl").write_text('{"prompt": "Хто?", "completion": "Я"}\n' * 500, encoding="utf-8")
    return TrainingRequest(
        run_id="20260101-abc",
        date="2026-01-01",
        dataset=PreparedDataset(
            path=prepared,
            date="2026-01-01",
            fingerprint="f" * 64,
            window_dates=["2026-01-01"],
            counts=Counts(lines=500, train=500, eval=0, duplicates=0, rejected=0, blank=0),
            rejects_by_reason={},
            rejects_by_file={},
        ),
        plan=TrainingPlan(
            trial_config=TrialConfig(trial_id="t", lora_rank=4),
            search_space={},
            memory_estimate=MemoryEstimate(
                vram_gb=1, fits=None, limit_gb=None, model_params=1, trainable_params=1, parts={}
            ),
            explanations=[],
            estimated_steps=4,
            estimated_tokens=None,
        ),
        base_model=BaseModelRef(name="tiny", path=root / "base", revision=None, fingerprint="b" * 64),
        adapter_dir=root / "adapters" / "20260101-abc",
        work_dir=root / "work",
    )


def trainer_for(server: H2OServer, *, limits: Limits | None = None, **timing: float) -> H2OTrainer:
    return H2OTrainer(api_url=server.url, api_key=KEY, timing=Timing(**{**FAST, **timing}), limits=limits or Limits())


def train(
    trainer: H2OTrainer,
    request: TrainingRequest,
    events: list[ProgressEvent] | None = None,
    external: list[tuple[str, str]] | None = None,
) -> TrainingResult:
    return trainer.train(
        request,
        on_progress=([] if events is None else events).append,
        on_external_run=lambda run, url: ([] if external is None else external).append((run, url)),
    )
