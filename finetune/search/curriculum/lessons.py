"""From records to a curriculum's trainings: which records each stage has, its plan, and the same data shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_64_intdigest

from finetune.dataset.chosen import trained_by_file
from finetune.dataset.models import PreparedDataset
from finetune.errors import ConfigurationError, DatasetError
from finetune.planning.cost import estimate_cost
from finetune.planning.models import CostEstimate, TrainingPlan
from finetune.planning.plan import trial_id_of
from finetune.search.candidates import Bench
from finetune.search.curriculum.difficulty import Records
from finetune.search.curriculum.spec import COMPARISON, CurriculumSpec
from finetune.training.data import Ints, training_order

# A forward pass takes a third of what a training step takes (Kaplan et al. 2020, section 2.1).
_FORWARD_SHARE = 1 / 3
# Of a record that no stage has.
NO_STAGE = -1


@dataclass(frozen=True)
class Lesson:
    """One training: the numbers of its records from 0, the last `replayed` of which are of earlier stages."""

    name: str
    rows: Ints
    replayed: int
    plan: TrainingPlan
    # lowest and highest difficulty of its own records
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Lessons:
    """The stages in order, and the comparison: the same data shuffled in one training of as many steps.

    `left_out` are records of no stage. `measuring` is the estimated cost of losses of the base model that are yet to
    be measured; while they are, records are dealt out at random, so that counts are exact and tokens expected.
    """

    stages: list[Lesson]
    shuffled: Lesson
    left_out: int
    measuring: CostEstimate | None = None

    @property
    def trainings(self) -> list[Lesson]:
        """All that is trained."""
        return [*self.stages, self.shuffled]

    def total(self, trainings: Sequence[Lesson] | None = None) -> TrainingPlan:
        """Trainings as one plan, for what they cost together with the measuring; all of them by default."""
        plans = [lesson.plan for lesson in (self.trainings if trainings is None else trainings)]
        costs = [cost for cost in (*(plan.cost for plan in plans), self.measuring) if cost is not None]
        hours = [cost.gpu_hours for cost in costs]
        prices = [cost.price for cost in costs]
        return self.shuffled.plan.model_copy(
            update={
                "estimated_steps": sum(plan.estimated_steps for plan in plans),
                "estimated_tokens": sum(plan.estimated_tokens or 0 for plan in plans),
                "cost": None
                if not costs
                else costs[0].model_copy(
                    update={
                        "gpu_hours": None if None in hours else sum(each for each in hours if each is not None),
                        "price": None if None in prices else sum(each for each in prices if each is not None),
                    }
                ),
            }
        )


def stages_of_exports(spec: CurriculumSpec, dataset: PreparedDataset) -> Ints:
    """The stage of each training record by the export that it came from; `NO_STAGE` for those of exports unnamed.

    Raises:
        ConfigurationError: the dataset has no such export.
        ArtifactError: the dataset's manifest is missing or damaged.
    """
    counts = trained_by_file(dataset)
    stage_of = {name: number for number, stage in enumerate(spec.stages) for name in stage.exports}
    if unknown := sorted(set(stage_of) - set(counts)):
        raise ConfigurationError(
            f"the dataset has no export {', '.join(unknown)}",
            where="stages.exports",
            remedy=f"It has {', '.join(counts)}",
        )
    return np.repeat([stage_of.get(name, NO_STAGE) for name in counts], list(counts.values()))


def stages_by_difficulty(spec: CurriculumSpec, records: Records) -> Ints:
    """The stage of each record: so many of the easiest are of the first; of equals the content's hash decides.

    Raises:
        ConfigurationError: all records are equally hard.
    """
    hardness = np.zeros(len(records)) if records.difficulty is None else records.difficulty
    if records.difficulty is not None and hardness.min() == hardness.max():
        raise ConfigurationError(
            f"all {len(records)} records have the same {spec.score or spec.by}, {hardness.min():g}: there is no order",
            where="by",
            remedy="Order by something else",
        )
    order = np.lexsort((records.contents, -hardness if spec.descending else hardness))
    bounds = np.round(np.cumsum([0.0, *spec.shares]) * len(records)).astype(np.int64)
    stage_of = np.empty(len(records), np.int64)
    stage_of[order] = np.repeat(np.arange(len(spec.stages)), np.diff(bounds))
    return stage_of


def lay_out(spec: CurriculumSpec, records: Records, stage_of: Ints, plan: TrainingPlan, bench: Bench) -> Lessons:
    """All trainings of a curriculum, priced.

    Args:
        spec: the curriculum.
        records: all that may be trained on.
        stage_of: the stage of each, or `NO_STAGE`.
        plan: of the whole; stages have its values but for their epochs and learning rates.
        bench: knows what trainings take here.

    Raises:
        DatasetError: a stage has no record.
    """
    stages = []
    seen = np.zeros(len(records), np.int64)
    for number, stage in enumerate(spec.stages):
        own = np.flatnonzero(stage_of == number)
        if not len(own):
            raise DatasetError(
                f"stage {stage.name} has none of the {len(records)} training records",
                where=records.path,
                remedy="Give it a larger share, other exports, or more data",
            )
        earlier = np.flatnonzero((stage_of >= 0) & (stage_of < number))
        again = _sample(records, earlier, stage.replay, f"{plan.trial_config.seed} {stage.name}")
        rows = np.concatenate([own, again])
        given = {"epochs": stage.epochs, "learning_rate": stage.learning_rate}
        found = _planned(
            plan, records, rows, bench, {name: value for name, value in given.items() if value is not None}
        )
        np.add.at(seen, rows[training_order(len(rows), found.trial_config)], 1)
        stages.append(Lesson(stage.name, rows, len(again), found, _span(records, own)))
    # Every record as often as in the stages; what all of it repeats are epochs, each in an order of its own.
    epochs = int(np.gcd.reduce(seen[seen > 0]))
    steps = sum(lesson.plan.estimated_steps for lesson in stages)
    rows = np.repeat(np.arange(len(records)), seen // epochs)
    shuffled = _planned(plan, records, rows, bench, {"epochs": float(epochs), "max_steps": steps})
    unmeasured = spec.by == "base_loss" and records.difficulty is None
    tokens = int(np.minimum(records.lengths, plan.trial_config.max_length).sum())
    return Lessons(
        stages=stages,
        shuffled=Lesson(COMPARISON, rows, 0, shuffled),
        left_out=int((stage_of == NO_STAGE).sum()),
        measuring=_cost(round(_FORWARD_SHARE * tokens), plan, bench) if unmeasured else None,
    )


def _sample(records: Records, rows: Ints, share: float, salt: str) -> Ints:
    """A share of records, in their order: those whose contents' hashes with a salt are the lowest."""
    salted = [xxh3_64_intdigest(content.tobytes() + salt.encode()) for content in records.contents[rows]]
    return np.sort(rows[np.argsort(np.array(salted, np.uint64), kind="stable")[: round(share * len(rows))]])


def _span(records: Records, rows: Ints) -> tuple[float, float] | None:
    if records.difficulty is None:
        return None
    return float(records.difficulty[rows].min()), float(records.difficulty[rows].max())


def _planned(
    plan: TrainingPlan, records: Records, rows: Ints, bench: Bench, changed: dict[str, float | int]
) -> TrainingPlan:
    """The plan of a training on some records."""
    trial = plan.trial_config.model_copy(update=changed)
    trial = trial.model_copy(update={"trial_id": trial_id_of(trial)})
    lengths = np.minimum(records.lengths[rows], trial.max_length)
    tokens = int(lengths[training_order(len(rows), trial)].sum())
    return plan.model_copy(
        update={
            "trial_config": trial,
            "estimated_steps": trial.steps(len(rows)),
            "estimated_tokens": tokens,
            "cost": _cost(tokens, plan, bench),
        }
    )


def _cost(tokens: int, plan: TrainingPlan, bench: Bench) -> CostEstimate:
    return estimate_cost(
        tokens,
        plan.trial_config.method,
        history=bench.measurements,
        stated_tokens_per_second=bench.tokens_per_second,
        price_per_gpu_hour=bench.price_per_gpu_hour,
    )
