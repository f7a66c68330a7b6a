from __future__ import annotations

import pytest

from finetune.errors import ConfigurationError
from finetune.planning.cost import estimate_cost, refuse_above
from finetune.planning.history import Measurement, measured_throughput, memory_correction
from finetune.planning.models import CostEstimate, MemoryEstimate, TrainingPlan, TrialConfig


def run(
    peak: float | None = None, speed: float | None = None, device: str = "NVIDIA L4", **fields: object
) -> Measurement:
    known = {"method": "lora", "device": device, "estimated_memory_gb": 10.0}
    return Measurement.model_validate({**known, "peak_memory_gb": peak, "tokens_per_second": speed, **fields})


def test_memory_is_corrected_by_the_median_of_the_newest_five() -> None:
    assert memory_correction([run(12), run(11), run(30), run(12.5), run(11.5), run(1), run(1)], "lora") == (1.2, 5)


def test_a_correction_is_bounded_and_of_the_method_s_own_runs_alone() -> None:
    assert memory_correction([run(500)], "lora") == (2.0, 1)
    assert memory_correction([run(0.1)], "lora") == (0.5, 1)
    assert memory_correction([run(15)], "qlora") == (1.0, 0)
    assert memory_correction([run(None), run(15, estimated_memory_gb=None)], "lora") == (1.0, 0)


def test_throughput_is_that_of_the_device_that_trained_last() -> None:
    history = [run(speed=None), run(speed=900.0), run(speed=1100.0), run(speed=9000.0, device="NVIDIA H100")]
    assert measured_throughput(history, "lora") == (1000.0, 2)
    assert measured_throughput(history, "ia3") is None


def test_measured_throughput_counts_more_than_stated() -> None:
    measured = estimate_cost(3_600_000, "lora", history=[run(speed=1000.0)], stated_tokens_per_second=1)
    assert measured.gpu_hours == pytest.approx(1)
    stated = estimate_cost(3_600_000, "lora", stated_tokens_per_second=500, price_per_gpu_hour=3)
    assert (stated.gpu_hours, stated.price, stated.throughput) == (pytest.approx(2), pytest.approx(6), "stated")
    unknown = estimate_cost(3_600_000, "lora", price_per_gpu_hour=3)
    assert (unknown.gpu_hours, unknown.price, unknown.throughput) == (None, None, "unknown")
    assert estimate_cost(None, "lora", stated_tokens_per_second=500).gpu_hours is None


def plan_of(hours: float | None) -> TrainingPlan:
    cost = CostEstimate(tokens_per_second=50, throughput="stated", gpu_hours=hours, price=None)
    memory = MemoryEstimate(vram_gb=1, fits=None, limit_gb=None, model_params=1, trainable_params=1, parts={})
    return TrainingPlan(
        trial_config=TrialConfig(trial_id="t"),
        search_space={},
        memory_estimate=memory,
        explanations=[],
        estimated_steps=12,
        estimated_tokens=345,
        cost=cost,
    )


def test_a_training_that_takes_longer_than_it_may_is_refused_with_the_numbers() -> None:
    numbers = r"about 3 GPU-hours and may take 2 \(345 tokens in 12 steps, at 50 tokens per second, stated\)"
    with pytest.raises(ConfigurationError, match=numbers):
        refuse_above(plan_of(3.0), 2)
    refuse_above(plan_of(2.0), 2)
    refuse_above(plan_of(3.0), None)
    refuse_above(plan_of(None), 2)
