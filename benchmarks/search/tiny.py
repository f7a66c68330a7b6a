"""The loss landscape of the embedded model over learning rate and rank, measured once by real trainings on a grid."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from finetune.base_model.embedded import make_embedded_model
from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.dataset.prepare import prepare_dataset
from finetune.dataset.profile import profile_dataset
from finetune.layout import DataLayout
from finetune.planning.models import Range
from finetune.planning.overrides import PlanOverrides
from finetune.planning.plan import make_plan
from finetune.progress import ProgressEvent
from finetune.publishing import write_json_atomically
from finetune.search.heldout import HeldOutLoss
from finetune.search.models import Value
from finetune.search.pruning import WHOLE, rungs
from finetune.training.models import TrainingRequest
from finetune.training.sft import train_adapter

EXPORTS = Path(__file__).parents[2] / "examples" / "exports"
CACHE = Path.home() / ".cache" / "lora-assets"
LOWEST, HIGHEST = 2e-5, 2e-2
RANKS = (2, 8, 32)
_LENGTH = 128


def space() -> dict[str, Range]:
    """What is searched: three decades of learning rates, three ranks."""
    return {
        "learning_rate": Range(low=LOWEST, high=HIGHEST, log=True),
        "lora_rank": Range(choices=list(RANKS)),
    }


class Landscape:
    """Held-out losses at each rung; between the grid's learning rates they are interpolated.

    Args:
        rates: shape (rates,), rising.
        losses: shape (rungs, ranks, rates), in nats per token.
    """

    def __init__(self, rates: np.ndarray, losses: np.ndarray) -> None:
        self._rates, self._losses = rates, losses

    def __call__(self, params: Mapping[str, Value], ninths: int) -> float:
        """The loss after so many ninths of the training."""
        line = self._losses[(1, 3, WHOLE).index(ninths), RANKS.index(int(params["lora_rank"]))]
        return float(np.interp(np.log(float(params["learning_rate"])), np.log(self._rates), line))


def landscape(*, steps: int, points: int) -> Landscape:
    """Measure the landscape by a training a point of the grid, or take what an earlier call measured.

    Args:
        steps: of each training.
        points: learning rates of the grid; there are three ranks.
    """
    rates = np.geomspace(LOWEST, HIGHEST, points).tolist()
    base = make_embedded_model(CACHE)
    path = CACHE / f"search-landscape-{base.fingerprint[:8]}-{steps}.json"
    known: dict[str, list[float]] = json.loads(path.read_bytes()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        layout = DataLayout(Path(scratch))
        files = discover_exports(EXPORTS)
        dataset = prepare_dataset(files, date=files[-1].date, layout=layout)
        profile = profile_dataset(dataset, encoder=RecordEncoder.load(base.path))
        held_out = HeldOutLoss(dataset.eval_path, base.path, max_length=_LENGTH)
        grid = [(rank, rate) for rank in RANKS for rate in rates]
        for number, (rank, rate) in enumerate(grid, start=1):
            key = f"{rank} {rate:.6g}"
            if key not in known:
                known[key] = _losses(base, dataset, profile, layout, held_out, rank, rate, steps)
                write_json_atomically(path, known)
                print(f"{number}/{len(grid)} rank {rank} rate {rate:.2g}: {known[key][-1]:.4f}", flush=True)
    rows = [[known[f"{rank} {rate:.6g}"] for rate in rates] for rank in RANKS]
    losses = np.array(rows).transpose(2, 0, 1)
    print(f"the lowest loss on the grid is {losses[-1].min():.4f}")
    return Landscape(np.array(rates), losses)


class _Recorder:
    """A listener that measures at the rungs and at the end."""

    def __init__(self, held_out: HeldOutLoss) -> None:
        self._held_out = held_out
        self.losses: list[float] = []

    def __call__(self, event: ProgressEvent) -> None:
        pass

    def after_step(self, step: int, total_steps: int, model: object) -> None:
        if step in rungs(total_steps) or step == total_steps:
            self.losses.append(self._held_out(model))  # type: ignore[arg-type]  # the protocol's own type


def _losses(
    base: BaseModelRef,
    dataset: PreparedDataset,
    profile: DatasetProfile,
    layout: DataLayout,
    held_out: HeldOutLoss,
    rank: int,
    rate: float,
    steps: int,
) -> list[float]:
    overrides = PlanOverrides(
        lora_rank=rank, learning_rate=rate, max_steps=steps, max_length=_LENGTH, micro_batch=4, accumulation=1
    )
    name = f"r{rank}-{rate:.6g}"
    request = TrainingRequest(
        run_id=name,
        date=dataset.date,
        dataset=dataset,
        plan=make_plan(base.path, profile, method="lora", overrides=overrides),
        base_model=base,
        adapter_dir=layout.adapter(name),
        work_dir=layout.work(name),
        processes=1,
    )
    recorder = _Recorder(held_out)
    train_adapter(request, on_progress=recorder)
    return recorder.losses
