"""The trainer's own client, the gateway and a real training, over real HTTP."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import httpx
import pytest

from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.progress import ProgressEvent
from finetune.training.models import TrainingRequest, TrainingResult
from resources.h2o.protocol import Timing
from resources.h2o_trainer import H2OTrainer
from tests.h2o_gateway.conftest import Launch
from tests.h2o_gateway.process import KEY, REAL, until
from tests.h2o_gateway.test_conversion import example_records
from tests.resources.h2o_training import request_in, train

RECORDS = 48


@pytest.fixture
def request_(tmp_path: Path, tiny_model: BaseModelRef) -> TrainingRequest:
    found = request_in(tmp_path)
    lines = [json.dumps(record, ensure_ascii=False) for record in example_records()[:RECORDS]]
    found.dataset.train_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    changes = {
        "lora_rank": 8,
        "epochs": 3,
        "learning_rate": 3e-3,
        "micro_batch": 4,
        "accumulation": 2,
        "max_length": 256,
    }
    trial = found.plan.trial_config.model_copy(update=changes)
    plan = found.plan.model_copy(update={"trial_config": trial})
    return found.model_copy(update={"plan": plan, "base_model": tiny_model})


def losses(result: TrainingResult, base: BaseModelRef) -> tuple[float, float]:
    """Mean loss of the trained records: the base model's and the adapter's."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), str(result.adapter_path))
    encoded = RecordEncoder.load(base.path).encode(example_records()[:12])

    def mean() -> float:
        found = []
        for one in encoded:
            pairs = zip(one.input_ids, one.trained_mask, strict=True)
            labels = torch.tensor([[token if mask else -100 for token, mask in pairs]])
            found.append(model(input_ids=torch.tensor([one.input_ids]), labels=labels).loss.item())
        return sum(found) / len(found)

    with torch.inference_mode():
        trained = mean()
        with model.disable_adapter():
            return mean(), trained


def test_a_real_training_outlives_the_gateways_death_and_brings_a_better_adapter(
    launch: Launch, request_: TrainingRequest, tiny_model: BaseModelRef
) -> None:
    gateway = launch(TRAIN_COMMAND=REAL, MODELS=f"{tiny_model.name}={tiny_model.path}")
    gateway.settings["PORT"] = str(httpx.URL(gateway.url).port)
    timing = Timing(poll=0.1, poll_ceiling=0.3, retry=0.1, retry_ceiling=0.3, retry_budget=60, total=300)
    trainer = H2OTrainer(api_url=gateway.url, api_key=KEY, timing=timing)
    events: list[ProgressEvent] = []
    results: list[TrainingResult] = []
    client = threading.Thread(target=lambda: results.append(train(trainer, request_, events)))
    client.start()

    def steps() -> list[int]:
        return [event.done for event in events if event.stage == "remote training"]

    until(lambda: steps() and steps()[-1] >= 1, 120)
    gateway.kill()
    struck = len(events)
    until(lambda: any("waiting for the H2O server" in event.stage for event in events[struck:]))
    gateway.start()
    client.join(200)
    [result] = results
    assert (result.status, result.training_steps, result.run_id) == ("completed", 18, request_.run_id)
    assert [point.step for point in result.loss_curve] == list(range(1, 19))
    assert [event.total for event in events if event.stage == "remote training"][-1] == 18
    [listed] = gateway.http.get("/api/experiments").json()["experiments"]
    assert (listed["id"], listed["status"], listed["attempt"]) == (result.external_run_id, "finished", 1)
    assert listed["idempotency_key"] == request_.run_id
    assert len(gateway.pids()) == 1
    base, trained = losses(result, tiny_model)
    assert trained < 0.8 * base
    config = json.loads((request_.adapter_dir / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.0)
    assert not os.path.lexists(request_.work_dir / "adapter.zip")
