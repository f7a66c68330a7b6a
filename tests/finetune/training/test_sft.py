from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.progress import ProgressEvent
from finetune.publishing import read_manifest
from finetune.training.models import TrainingRequest
from finetune.training.sft import dry_run, train_adapter

MakeRequest = Callable[..., TrainingRequest]


def test_a_training_publishes_an_adapter_that_plain_peft_loads(make_request: MakeRequest) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    request = make_request()
    events: list[ProgressEvent] = []
    result = train_adapter(request, on_progress=events.append)
    print(result, events)
    assert result.status == "completed"
    base = AutoModelForCausalLM.from_pretrained(request.base_model.path)
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, request.adapter_dir)
    assert not torch.equal(model(ids).logits, before)
