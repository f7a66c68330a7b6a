"""What only a GPU can show; skipped by name where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune.training.models import TrainingRequest
from finetune.training.sft import train_adapter

MakeRequest = Callable[..., TrainingRequest]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "trial",
    [{}, {"method": "qlora", "optimizer": "paged_adamw_8bit"}, {"gradient_checkpointing": True}],
    ids=["lora", "qlora", "checkpointing"],
)
def test_a_training_in_bf16_learns_and_tells_its_device_and_memory(
    make_request: MakeRequest, trial: dict[str, Any]
) -> None:
    import torch

    request = make_request(precision="bf16", **trial).model_copy(update={"processes": 1})
    result = train_adapter(request)
    assert result.loss_curve[-1].loss < result.loss_curve[0].loss
    assert result.device == torch.cuda.get_device_name()
    assert result.peak_memory_gb is not None
    assert 0 < result.peak_memory_gb * 1e9 <= torch.cuda.get_device_properties(0).total_memory


def test_every_gpu_of_the_machine_takes_its_share(make_request: MakeRequest) -> None:
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip("one GPU is here")
    settings: dict[str, Any] = {"micro_batch": 1, "accumulation": 2 * gpus, "max_steps": 4}
    alone = train_adapter(make_request(place="alone", **settings).model_copy(update={"processes": 1}))
    together = train_adapter(make_request(place="all", **settings))
    assert [point.loss for point in together.loss_curve] == pytest.approx(
        [point.loss for point in alone.loss_curve], abs=1e-3
    )
