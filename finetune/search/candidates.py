"""From a suggestion to the plan of a trial, and what an experiment may try at all; no training library is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.base_model.models import BaseModelRef
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.errors import ConfigurationError
from finetune.planning.cost import estimate_cost
from finetune.planning.history import Measurement
from finetune.planning.models import Method, Range, TrainingPlan
from finetune.planning.overrides import PlanOverrides
from finetune.planning.plan import make_plan
from finetune.planning.rules import Device
from finetune.search.ledger import trials_remaining
from finetune.search.models import TrialRecord, Value
from finetune.search.space import joint_space, plain, refuse_bad_space
from finetune.search.spec import ExperimentSpec, TrainingSpec
from finetune.search.suggest import suggest


@dataclass(frozen=True)
class Bench:
    """What trials are made on: the data, the model, the machine, and what earlier trainings took there."""

    dataset: PreparedDataset
    profile: DatasetProfile
    base_model: BaseModelRef
    device: Device
    vram_limit_gb: float | None = None
    measurements: Sequence[Measurement] = ()
    tokens_per_second: float | None = None
    price_per_gpu_hour: float | None = None

    def measured(self, measurements: Sequence[Measurement]) -> Bench:
        """The same with newer measurements."""
        return replace(self, measurements=measurements)


@dataclass(frozen=True)
class Candidate:
    """A configuration to try: `gpu_hours` is its estimate, or None where nothing was measured or stated."""

    params: dict[str, Value]
    plan: TrainingPlan

    @property
    def gpu_hours(self) -> float | None:
        """Estimated hours of one device."""
        return None if self.plan.cost is None else self.plan.cost.gpu_hours


def experiment_space(spec: ExperimentSpec, bench: Bench) -> dict[str, Range]:
    """What the experiment searches: the plan's ranges of each method, narrowed and replaced as it says.

    Raises:
        ConfigurationError: a method has nothing to search, or a range cannot be drawn from.
        BaseModelError: the model's configuration is missing, damaged or of an unknown family.
    """
    fixed = set(spec.fixed.model_dump(exclude_none=True))
    spaces: dict[str, dict[str, Range]] = {}
    for method in spec.methods:
        planned = plan_of(spec, bench, {}, method=method).search_space
        space = {name: span for name, span in planned.items() if name in spec.parameters and name not in fixed}
        for name, span in spec.search_space.items():
            owner, _, bare = name.rpartition(".")
            # A range for all methods replaces those of the methods that have such a value.
            if owner == method or (not owner and (len(spec.methods) == 1 or bare in planned)):
                space[bare] = span
        if not space:
            raise ConfigurationError(
                f"{method} has nothing to search",
                where="parameters",
                remedy=f"Its parameters are {', '.join(sorted(set(planned) - {'method'}))}",
            )
        spaces[method] = {"method": Range(choices=[method]), **space}
    joint = joint_space(spaces)
    refuse_bad_space(joint)
    return joint


def plan_of(
    spec: TrainingSpec, bench: Bench, params: Mapping[str, Any], *, method: Method | None = None
) -> TrainingPlan:
    """The plan of one configuration, with its estimates.

    Raises:
        ConfigurationError: the values contradict each other, or do not fit the memory.
    """
    values: dict[str, Any] = {**spec.fixed.model_dump(exclude_none=True), **plain(params)}
    chosen = values.pop("method", method)
    modules = values.get("target_modules")
    if isinstance(modules, str) and modules != "all-linear":
        values["target_modules"] = modules.split(",")
    return make_plan(
        bench.base_model.path,
        bench.profile,
        task=spec.task,
        method=chosen,
        overrides=PlanOverrides.model_validate(values),
        vram_limit_gb=bench.vram_limit_gb,
        device=bench.device,
        history=bench.measurements,
        stated_tokens_per_second=spec.tokens_per_second or bench.tokens_per_second,
        price_per_gpu_hour=bench.price_per_gpu_hour,
    )


def priced(spec: TrainingSpec, plan: TrainingPlan, bench: Bench) -> TrainingPlan:
    """The same plan, with its cost by what was measured since: measurements may change plans, too."""
    cost = estimate_cost(
        plan.estimated_tokens,
        plan.trial_config.method,
        history=bench.measurements,
        stated_tokens_per_second=spec.tokens_per_second or bench.tokens_per_second,
        price_per_gpu_hour=bench.price_per_gpu_hour,
    )
    return plan.model_copy(update={"cost": cost})


def next_candidate(
    spec: ExperimentSpec,
    bench: Bench,
    space: Mapping[str, Range],
    history: Sequence[TrialRecord],
    budget_remaining: float,
) -> Candidate | None:
    """The next trial, or None when nothing more may start.

    Raises:
        ConfigurationError: what is suggested contradicts itself, or does not fit the memory.
    """
    params = suggest(
        history,
        space,
        spec.strategy,
        budget_remaining,
        trials_remaining(history, spec.limits),
        seed=spec.seed,
        sampler=spec.sampler,
    )
    return None if params is None else Candidate(params, plan_of(spec, bench, params))
