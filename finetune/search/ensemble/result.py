"""What became of an ensemble and its members."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from finetune.search.ensemble.spec import EnsembleSpec, Taste


class Figures(BaseModel):
    """Losses of one adapter in nats per token on both halves, and the second's 95 % interval over records."""

    model_config = ConfigDict(frozen=True)

    selection_loss: float
    judging_loss: float
    judging_ci95: tuple[float, float]


class Verdict(BaseModel):
    """Whether the combination is published.

    `delta` is its loss minus the best member's on the judging half in nats per token, `delta_ci95` the interval of
    that over records, `better_records` how many of them have a lower loss with it; all three are None where there is
    no combination.
    """

    model_config = ConfigDict(frozen=True)

    published: bool
    reason: str
    delta: float | None = None
    delta_ci95: tuple[float, float] | None = None
    better_records: int | None = None


class Evaluated(BaseModel):
    """An adapter and its evaluation, by which its figures can be traced: the report holds each record's losses."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    adapter_hash: str
    report_path: Path
    report_sha256: str
    figures: Figures


class Member(BaseModel):
    """One member: how it was trained, or would be, and what it is worth.

    `gpu_hours` are of one device, CPU or GPU; they and `price` are estimates until it is trained. `fault` says why
    it is left out.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    params: dict[str, int]
    # the fold that it was trained without, from 0
    fold: int | None
    training_steps: int | None = None
    gpu_hours: float | None = None
    price: float | None = None
    run_id: str = ""
    dataset_fingerprint: str = ""
    adapter_path: Path | None = None
    evaluated: Evaluated | None = None
    weight: float = 0.0
    fault: str = ""


class EnsembleResult(BaseModel):
    """What became of an ensemble; losses are in nats per token of the assistant's side."""

    model_config = ConfigDict(frozen=True)

    status: Literal["published", "not_published", "dry_run"]
    # none in a dry run
    name: str
    spec: EnsembleSpec
    dataset_fingerprint: str
    base_model: str
    base_fingerprint: str
    members: list[Member]
    reason: str = ""
    # where the report is
    path: Path | None = None
    # of the combination, where it was published
    adapter_path: Path | None = None
    # lowest loss on the selection half
    best_member: str | None = None
    base: Figures | None = None
    combination: Evaluated | None = None
    verdict: Verdict | None = None
    tastes: list[Taste] = []
    selection_records: int = 0
    judging_records: int = 0
    reused: bool = False

    @property
    def gpu_hours(self) -> float | None:
        """Hours of one device of all trainings; None where one is unknown."""
        hours = [member.gpu_hours for member in self.members if not member.fault]
        return None if None in hours else sum(each or 0.0 for each in hours)

    @property
    def price(self) -> float | None:
        """What a dry run's trainings are estimated to cost; None where one is unknown."""
        prices = [member.price for member in self.members]
        return None if None in prices else sum(each or 0.0 for each in prices)
