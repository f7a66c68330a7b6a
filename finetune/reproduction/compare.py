"""Whether a training came out again: the same bits, or as near as is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from finetune.adapter_files import WEIGHTS_NAME, adapter_hash
from finetune.errors import ArtifactError
from finetune.reproduction.models import TrainingEntry

Verdict = Literal["bit-identical", "within tolerance", "different"]


class Compared(BaseModel):
    """A training beside its repetition; differences of losses are in nats per token.

    `largest_weight_difference` is None where the published adapter is not at hand, when hashes and metrics decide, or
    has other tensors.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    verdict: Verdict
    reason: str
    adapter_hash: str
    reproduced_hash: str
    largest_weight_difference: float | None
    # name: (recorded, reproduced)
    metrics: dict[str, tuple[float, float]]
    # where the repetition lies
    adapter: Path
    must_be_identical: bool


def compare(
    entry: TrainingEntry,
    reproduced: Path,
    metrics: Mapping[str, tuple[float, float]],
    *,
    published: Iterable[Path],
    tolerance: float,
    must_be_identical: bool,
    not_evaluated: Sequence[str] = (),
) -> Compared:
    """Compare a repetition with what the manifest says, and with the published adapter where that is at hand.

    Args:
        entry: the training.
        reproduced: the repetition's adapter.
        metrics: by name, as recorded and as found again.
        published: where the adapter may lie that was made first.
        tolerance: the most by which a weight or a metric may differ, where bits need not be equal.
        must_be_identical: whether they need.
        not_evaluated: evaluations whose records are not at hand.

    Raises:
        ArtifactError: the repetition is damaged.
    """
    recorded, found = entry.result.adapter_hash or "", adapter_hash(reproduced)
    original = next((path for path in published if _is(path, recorded)), None)
    weights = 0.0 if found == recorded else None if original is None else largest_difference(original, reproduced)
    verdict, reason = _verdict(found == recorded, weights, metrics, tolerance, must_be_identical)
    if not_evaluated:
        reason += f"; not evaluated again, for its records are not at hand: {', '.join(not_evaluated)}"
    return Compared(
        run_id=entry.run_id,
        verdict=verdict,
        reason=reason,
        adapter_hash=recorded,
        reproduced_hash=found,
        # JSON knows no infinity; the reason tells of it.
        largest_weight_difference=weights if weights is not None and math.isfinite(weights) else None,
        metrics=dict(metrics),
        adapter=reproduced,
        must_be_identical=must_be_identical,
    )


def largest_difference(one: Path, other: Path) -> float:
    """The largest absolute difference of two adapters' weights; infinite where tensors differ or hold no numbers."""
    from safetensors.torch import load_file

    first, second = (load_file(path / WEIGHTS_NAME) for path in (one, other))
    if {name: tensor.shape for name, tensor in first.items()} != {name: each.shape for name, each in second.items()}:
        return math.inf
    apart = [float((first[name].double() - second[name].double()).abs().max()) for name in first]
    return math.inf if any(map(math.isnan, apart)) else max(apart)


def _verdict(
    identical: bool,
    weights: float | None,
    metrics: Mapping[str, tuple[float, float]],
    tolerance: float,
    must_be_identical: bool,
) -> tuple[Verdict, str]:
    apart = {name: abs(again - once) for name, (once, again) in metrics.items()}
    if identical:
        # (So that what is no number is off as well.)
        off = [name for name, difference in apart.items() if not difference <= tolerance]
        if off:
            return "different", f"the adapter is the same, its evaluation is not: {', '.join(off)}"
        return "bit-identical", "the adapter's hash is the same"
    told = [
        f"weights differ by up to {weights:.3g}" if weights is not None else "the weights cannot be compared",
        *(f"{name} by {difference:.3g}" for name, difference in apart.items() if difference),
    ]
    if must_be_identical:
        return "different", f"the same bits were to come out, on a CPU with the same libraries: {', '.join(told)}"
    if weights is None and not apart:
        return "different", "the hash is another one, and neither weights nor metrics can be compared"
    if not all(difference <= tolerance for difference in (*apart.values(), weights or 0.0)):
        return "different", f"beyond the tolerance of {tolerance:g}: {', '.join(told)}"
    return "within tolerance", f"within {tolerance:g}: {', '.join(told)}"


def _is(path: Path, digest: str) -> bool:
    try:
        return adapter_hash(path) == digest
    except (ArtifactError, OSError):
        return False


def all_equal(compared: Sequence[Compared]) -> bool:
    """Whether every training came out again."""
    return all(each.verdict != "different" for each in compared)
