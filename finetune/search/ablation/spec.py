"""An ablation as a person writes it down, and the configurations that it trains."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, ValidationError, field_validator, model_validator

from finetune.errors import ConfigurationError
from finetune.planning.cost import gpu_hours
from finetune.planning.model_config import read_model_shape
from finetune.planning.models import TrainableMethod, TrainingPlan, TrialConfig
from finetune.planning.overrides import PlanOverrides
from finetune.planning.plan import trial_id_of
from finetune.publishing import sha256_json
from finetune.search.adoption import as_overrides
from finetune.search.candidates import Bench, plan_of, priced
from finetune.search.models import StepResult, Value
from finetune.search.space import counts_for
from finetune.search.spec import TrainingSpec

# Part of an ablation's name: raise it when its figures change their meaning.
METHOD = 1
# A value of the plan; the names of modules are several.
Setting = Value | list[str]


class AblationSpec(TrainingSpec):
    """All fields of an ablation: each parameter varied alone, or with `grid` all of them together."""

    may_change: ClassVar[frozenset[str]] = TrainingSpec.may_change | {"tokens_per_second"}

    method: TrainableMethod = "lora"
    # fields of the plan, each with its values; the base configuration is the plan's, with what is fixed
    parameters: dict[str, list[Setting]] = Field(min_length=1)
    grid: bool = False
    # how often each configuration is trained: with `seed` and the numbers after it
    seeds: int = Field(3, ge=2, le=100)
    seed: int = Field(42, ge=0)

    @field_validator("parameters")
    @classmethod
    def _values_of_the_plan(cls, parameters: dict[str, list[Setting]]) -> dict[str, list[Setting]]:
        return {name: _checked(name, values) for name, values in parameters.items()}

    @model_validator(mode="after")
    def _fitting(self) -> AblationSpec:
        if self.fixed.seed is not None:
            raise ValueError("every configuration has the same seeds: give the first as seed, not in fixed")
        if foreign := [name for name in self.parameters if not counts_for(name, self.method)]:
            raise ValueError(f"{', '.join(foreign)} decides nothing in trainings by {self.method}")
        if "epochs" in self.parameters and (self.fixed.max_steps is not None or "max_steps" in self.parameters):
            raise ValueError("epochs decides nothing where max_steps is given")
        return self

    def name(self, *of: str) -> str:
        """The ablation's name: of what is trained, and on what.

        Args:
            of: fingerprints of the dataset and of the base model.
        """
        return f"ablation-{self.identity(str(METHOD), *of)}"


@dataclass(frozen=True)
class Arm:
    """One configuration and its plans, one a seed; the base configuration has no `changed` values."""

    changed: Mapping[str, Setting]
    plans: list[TrainingPlan]

    @property
    def trial(self) -> TrialConfig:
        """The configuration with the first seed."""
        return self.plans[0].trial_config


def arms_of(spec: AblationSpec, bench: Bench) -> list[Arm]:
    """What the ablation trains, the base configuration first; equal configurations are one.

    All that a changed value does not name stays as it is in the base configuration, also what a plan would choose by
    it. Configurations depend on no measurement, so that an ablation that is run again trains the same.

    Args:
        spec: the ablation's.
        bench: its measurements are for the costs.

    Raises:
        ConfigurationError: names all values that contradict the configuration, or do not fit the memory or the model.
        BaseModelError: the model's configuration is missing, damaged or of an unknown family.
    """
    planned = plan_of(spec, bench.measured(()), {}, method=spec.method)
    _, given = as_overrides(planned.trial_config)
    shape = read_model_shape(bench.base_model.path)
    plans: dict[str, tuple[Mapping[str, Setting], TrainingPlan]] = {planned.trial_config.trial_id: ({}, planned)}
    faults: list[str] = []
    for changed in _variations(spec):
        varied = spec.model_copy(update={"fixed": given.model_copy(update=dict(changed))})
        try:
            plan = plan_of(varied, bench.measured(()), {}, method=planned.trial_config.method)
            shape.targets(plan.trial_config.target_modules)
        except ConfigurationError as error:
            faults.append(f"{shown(changed)}: {error.what}")
        else:
            plans.setdefault(plan.trial_config.trial_id, (changed, plan))
    if faults:
        raise ConfigurationError(
            "; ".join(faults), where="parameters", remedy="Leave these values out; nothing was trained"
        )
    if len(plans) == 1:
        raise ConfigurationError(
            f"nothing to compare: {shown(next(_variations(spec)))} is the base configuration",
            where="parameters",
            remedy="Give other values",
        )
    seeds = range(spec.seed, spec.seed + spec.seeds)
    return [
        Arm(changed, [_seeded(priced(spec, plan, bench), seed) for seed in seeds]) for changed, plan in plans.values()
    ]


def dry_run(spec: AblationSpec, arms: Sequence[Arm]) -> StepResult:
    """Every configuration with what it costs, as if none had been trained before."""
    plans = [plan for arm in arms for plan in arm.plans]
    hours, prices = gpu_hours(plans), [plan.cost.price if plan.cost else None for plan in plans]
    total = "unknown time: nothing was measured, set tokens_per_second" if hours is None else f"{hours:.3g} GPU-hours"
    return StepResult(
        data={
            "ablation": spec.model_dump(mode="json"),
            "proposed": [
                {
                    "configuration": shown(arm.changed),
                    "trial_config": arm.trial.model_dump(mode="json"),
                    "trainings": len(arm.plans),
                    "steps": arm.plans[0].estimated_steps,
                    "gpu_hours": gpu_hours(arm.plans),
                    "vram_gb": arm.plans[0].memory_estimate.vram_gb,
                }
                for arm in arms
            ],
        },
        artifacts=[],
        output_text=f"dry run: {len(plans)} trainings of {len(arms)} configurations, {total}",
        metadata={
            "status": "dry_run",
            "trainings": len(plans),
            "estimated_gpu_hours": hours,
            "estimated_price": None if None in prices else sum(price or 0.0 for price in prices),
        },
    )


def shown(changed: Mapping[str, Setting]) -> str:
    """Values as a person reads them."""
    return ", ".join(f"{name} {shown_value(value)}" for name, value in changed.items()) or "the base configuration"


def shown_value(value: Setting | None) -> str:
    """One value as a person reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return "+".join(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _checked(name: str, values: list[Setting]) -> list[Setting]:
    if name == "seed":
        raise ValueError("the seed is no parameter of an ablation: every value is trained with the same seeds")
    if name not in PlanOverrides.model_fields:
        raise ValueError(f"no parameter of a training: {name}")
    if not values:
        raise ValueError(f"{name} has no values")
    checked = [_as_planned(name, value) for value in values]
    if len({sha256_json(value) for value in checked}) < len(checked):
        raise ValueError(f"a value of {name} stands there twice")
    return checked


def _as_planned(name: str, value: Setting) -> Any:
    """The value as plans have it, where 16 may be 16.0."""
    try:
        return getattr(PlanOverrides.model_validate_json(json.dumps({name: value}), strict=True), name)
    except ValidationError as error:
        raise ValueError(f"{name} {value}: {error.errors()[0]['msg']}") from error


def _variations(spec: AblationSpec) -> Iterator[dict[str, Setting]]:
    if spec.grid:
        for together in itertools.product(*spec.parameters.values()):
            yield dict(zip(spec.parameters, together, strict=True))
    else:
        for name, values in spec.parameters.items():
            for value in values:
                yield {name: value}


def _seeded(plan: TrainingPlan, seed: int) -> TrainingPlan:
    trial = plan.trial_config.model_copy(update={"seed": seed})
    return plan.model_copy(update={"trial_config": trial.model_copy(update={"trial_id": trial_id_of(trial)})})
