from pathlib import Path
from typing import Any

import pytest

from finetune.training.models import TrainingResult
from lora_assets.recording import measurement_of
from tests.resources.h2o_training import request_in


@pytest.mark.parametrize(
    ("sharding", "processes", "speed", "compares"),
    [("ddp", 1, 1200.0, True), ("fsdp", 1, 1200.0, True), ("ddp", 4, 300.0, True), ("fsdp", 4, 300.0, False)],
)
def test_plans_learn_what_one_device_did_and_held(
    tmp_path: Path, sharding: Any, processes: int, speed: float, compares: bool
) -> None:
    """The hours that four GPUs take together are four times those on the clock."""
    result = TrainingResult(
        status="completed",
        run_id="r",
        backend="hf-peft",
        adapter_path=None,
        adapter_hash=None,
        training_steps=4,
        gpu_hours=1.0,
        final_loss=1.0,
        tokens_per_second=1200.0,
        peak_memory_gb=2.0,
        device="NVIDIA L4",
        micro_batch=4,
        processes=processes,
    )
    taken = measurement_of(request_in(tmp_path).model_copy(update={"sharding": sharding}), result)
    assert taken is not None
    assert taken.tokens_per_second == speed
    assert (taken.estimated_memory_gb is not None) == compares
