"""What earlier trainings took, and what the next estimate makes of it.

The rule for memory: the estimate is multiplied by the median of measured / estimated over the newest
`_RUNS` trainings of the same model by the same method on the same kind of device. A median, so that one
odd run decides nothing; bounded by `_BOUNDS`, so that a wrong measurement cannot make a plan absurd. The
estimates that count are those of arithmetic alone, so corrections do not pile up. Throughput is the median
of tokens per second over the same runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from pydantic import BaseModel, ConfigDict

from finetune.planning.models import Method

_RUNS = 5
_BOUNDS = 0.5, 2.0


class Measurement(BaseModel):
    """One finished training: its method and device, memory in GB (10^9 bytes), trained tokens per second.

    `estimated_memory_gb` is the arithmetic's, uncorrected; figures that do not compare are left out.
    """

    model_config = ConfigDict(frozen=True)

    method: Method
    device: str
    estimated_memory_gb: float | None = None
    peak_memory_gb: float | None = None
    tokens_per_second: float | None = None


def memory_correction(history: Sequence[Measurement], method: Method) -> tuple[float, int]:
    """The factor for the next estimate, and how many trainings it comes from (1.0 and 0 where there are none).

    Args:
        history: trainings of the model, newest first.
        method: of the training to be planned.
    """
    ratios = [
        run.peak_memory_gb / run.estimated_memory_gb
        for run in history
        if run.method == method and run.peak_memory_gb and run.estimated_memory_gb
    ][:_RUNS]
    if not ratios:
        return 1.0, 0
    low, high = _BOUNDS
    return min(max(median(ratios), low), high), len(ratios)


def measured_throughput(history: Sequence[Measurement], method: Method) -> tuple[float, int] | None:
    """Tokens per second to expect, and how many trainings say so; only those on the device that trained last.

    Arguments are those of `memory_correction`.
    """
    runs = [run for run in history if run.method == method and run.tokens_per_second]
    figures = [run.tokens_per_second for run in runs if run.device == runs[0].device and run.tokens_per_second][:_RUNS]
    return (median(figures), len(figures)) if figures else None
