"""Continual learning: what going on from a champion costs in what it knew, beside training on everything anew.

Forgetting is the change in loss on the held-out records that the champion's own dataset had (Chaudhry et al.,
"Riemannian Walk for Incremental Learning", ECCV 2018, with a loss in the place of an accuracy).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune.errors import DatasetError
from finetune.evaluation.figures import RESAMPLES
from finetune.evaluation.statistics import bootstrap_ci95
from finetune.planning.models import TrainableMethod
from finetune.registry.champion import LEAST_RECORDS
from finetune.search.spec import TrainingSpec

ArmName = Literal["base model", "champion", "continued", "continued without replay", "from scratch"]
Part = Literal["old", "new"]
PARTS: tuple[Part, ...] = ("old", "new")
# What is compared, with what, on what: forgetting first.
_COMPARED: tuple[tuple[ArmName, ArmName], ...] = (
    ("continued", "champion"),
    ("continued without replay", "champion"),
    ("continued", "continued without replay"),
    ("continued", "from scratch"),
)


class ContinualSpec(TrainingSpec):
    """What is compared: going on from a version, with and without replay, and training from scratch.

    `fixed` holds for all trainings; what it leaves open is as in the version's adapter for those that go on, and the
    plan's choice for the one from scratch, as is `method`.
    """

    # such as v3; None is the last champion of an earlier date
    version: str | None = Field(None, pattern=r"^v[1-9][0-9]*$")
    # share of records that the version knows, of all that are trained on
    replay_fraction: float = Field(0.25, ge=0, lt=1)
    without_replay: bool = True
    method: TrainableMethod | None = None
    # of the bootstrap
    seed: int = Field(42, ge=0)

    @model_validator(mode="after")
    def _of_the_loop(self) -> ContinualSpec:
        if self.dataset_path is not None:
            raise ValueError("old and new are dates of the loop's exports: name a dataset_date, not a dataset_path")
        return self


class Arm(BaseModel):
    """One of the models that are compared; losses in nats per token of the assistant's side.

    What a training took is None where the arm was not trained for the comparison; of a dry run it is estimated, and
    nothing was measured. `report_path` is the evaluation that holds each record's losses.
    """

    model_config = ConfigDict(frozen=True)

    name: ArmName
    run_id: str | None
    adapter_hash: str | None = None
    dataset_fingerprint: str | None = None
    records: int | None = None
    tokens: int | None = None
    steps: int | None = None
    gpu_hours: float | None = None
    price: float | None = None
    report_path: Path | None = None
    report_sha256: str | None = None
    loss: dict[Part, float] = Field(default_factory=dict)


class Change(BaseModel):
    """How much higher the loss of `arm` is than that of `against`, over the same records; negative: it is better."""

    model_config = ConfigDict(frozen=True)

    arm: ArmName
    against: ArmName
    part: Part
    # held out, of that part
    records: int
    # the trainings that it was computed from; None for the base model
    run_ids: tuple[str | None, str | None]
    change: float
    # bootstrap 95 % confidence interval, paired by record
    ci95: tuple[float, float]

    @property
    def shown(self) -> bool:
        """Whether the whole interval lies on one side of zero, and there are enough records for one."""
        return self.records >= LEAST_RECORDS and (self.ci95[0] > 0 or self.ci95[1] < 0)


class ContinualResult(BaseModel):
    """What was found; `old_records` and `new_records` are held out."""

    model_config = ConfigDict(frozen=True)

    status: Literal["completed", "dry_run"]
    name: str
    spec: ContinualSpec
    date: str
    version: str
    # the version's own date
    known_date: str
    dataset_fingerprint: str
    base_model: str
    base_fingerprint: str
    trained_new: int
    trained_replayed: int
    arms: list[Arm]
    old_records: int = 0
    new_records: int = 0
    changes: list[Change] = []
    conclusion: str
    # where the report is
    path: Path | None = None
    reused: bool = False

    def arm(self, name: ArmName) -> Arm | None:
        """The arm of that name, if it was part of it."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def change(self, arm: ArmName, against: ArmName, part: Part) -> Change | None:
        """One comparison, if it was made."""
        wanted = (arm, against, part)
        return next((each for each in self.changes if (each.arm, each.against, each.part) == wanted), None)

    @property
    def forgetting(self) -> Change | None:
        """What going on cost in what the champion knew."""
        return self.change("continued", "champion", "old")


@dataclass(frozen=True)
class Losses:
    """Each arm's summed losses of the same records, which are old or new.

    `tokens` and `old` have the shape (records,), and so has each of `nats`.
    """

    tokens: npt.NDArray[np.int64]
    old: npt.NDArray[np.bool_]
    nats: dict[ArmName, npt.NDArray[np.float64]]

    def of(self, part: Part) -> npt.NDArray[np.bool_]:
        """Which records are of this part."""
        return self.old if part == "old" else ~self.old


def refuse_one_sided(old: npt.NDArray[np.bool_]) -> None:
    """Check that something can be said of old and of new data.

    Args:
        old: which held-out records are old; shape (records,).

    Raises:
        DatasetError: none is, or all are.
    """
    for part, some in zip(PARTS, (old.any(), not old.all()), strict=True):
        if not some:
            raise DatasetError(
                f"none of the {len(old)} held-out records is {part}, so nothing can be said of it",
                where="the continual report",
                remedy="Bring more data, raise EVAL_FRACTION, widen DATASET_WINDOW, or choose another date or version",
            )


def measured(arms: list[Arm], losses: Losses, *, seed: int) -> tuple[list[Arm], list[Change]]:
    """The arms with their losses on old and new records, and how they differ.

    Raises:
        DatasetError: no held-out record is old, or none is new.
    """
    refuse_one_sided(losses.old)

    def loss(name: ArmName, part: Part) -> float:
        chosen = losses.of(part)
        return float(losses.nats[name][chosen].sum() / losses.tokens[chosen].sum())

    def change(ours: Arm, theirs: Arm, part: Part) -> Change:
        chosen = losses.of(part)
        differences = (losses.nats[ours.name] - losses.nats[theirs.name])[chosen]
        return Change(
            arm=ours.name,
            against=theirs.name,
            part=part,
            records=int(chosen.sum()),
            run_ids=(ours.run_id, theirs.run_id),
            change=loss(ours.name, part) - loss(theirs.name, part),
            ci95=bootstrap_ci95(differences, losses.tokens[chosen], resamples=RESAMPLES, seed=seed),
        )

    found = [arm.model_copy(update={"loss": {part: loss(arm.name, part) for part in PARTS}}) for arm in arms]
    by_name = {arm.name: arm for arm in found}
    pairs = [(by_name[a], by_name[b]) for a, b in _COMPARED if a in by_name and b in by_name]
    return found, [change(ours, theirs, part) for ours, theirs in pairs for part in PARTS]


def concluded(result: ContinualResult) -> str:
    """The conclusion, from the figures of a result that has them."""
    told = [
        _told(result, "continued", "champion", f"Going on from {result.version}"),
        _told(result, "continued", "continued without replay", "Replay"),
        _told(result, "continued", "from scratch", "Against training from scratch, going on"),
    ]
    cost = ""
    ours, scratch = result.arm("continued"), result.arm("from scratch")
    if ours and scratch and ours.tokens and scratch.tokens:
        cost = f" It took {ours.tokens / scratch.tokens:.0%} of the training tokens from scratch."
    return " ".join(filter(None, told)) + cost


def _told(result: ContinualResult, arm: ArmName, against: ArmName, who: str) -> str:
    changes = [change for part in PARTS if (change := result.change(arm, against, part))]
    return f"{who} {', and '.join(map(_in_words, changes))}." if changes else ""


def _in_words(change: Change) -> str:
    low, high = change.ci95
    interval = f"{change.change:+.4f} nats per token, 95 % {low:+.4f} to {high:+.4f}"
    if not change.shown:
        return f"is not shown to change the loss on {change.part} data ({interval})"
    return f"{'raises' if change.change > 0 else 'lowers'} the loss on {change.part} data ({interval})"
