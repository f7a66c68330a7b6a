"""Whether a date's training begins with the base model alone or goes on with a champion: decided once per question."""

from __future__ import annotations

from finetune.base_model.models import BaseModelRef
from finetune.dataset.deletions import Deletions, with_contents
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import PreparedDataset
from finetune.errors import ConfigurationError
from finetune.planning.models import Method, Start, TrainingPlan
from finetune.planning.overrides import PlanOverrides
from finetune.publishing import sha256_json
from finetune.registry.champion import champion_before
from finetune.registry.models import RegisteredVersion
from finetune.registry.store import get_version
from finetune.training.continuation import MakePlan, continued_plan
from lora_assets.freshness import read_value
from lora_assets.settings import Settings


def with_start(
    settings: Settings,
    ordinary: TrainingPlan,
    *,
    dataset: PreparedDataset,
    base_model: BaseModelRef,
    init_from: str,
    replay_fraction: float,
    method: Method | None,
    overrides: PlanOverrides,
    make_plan: MakePlan,
) -> TrainingPlan:
    """The plan that goes on with a champion, or the ordinary one with the reason why it does not.

    A champion is the last to reign of the versions of earlier dates. What the date's plan decided before stays decided
    while the same is asked (dataset, base model, settings), whoever reigns meanwhile: a training that was killed goes
    on, and a date that is made again is the same.

    Args:
        settings: in force.
        ordinary: the plan that begins with the base model alone.
        dataset: the date's.
        base_model: the one in use.
        init_from: ``champion``, or a registered version such as ``v3``.
        replay_fraction: share of the replayed records.
        method: as given by a person, or None.
        overrides: as given by a person.
        make_plan: makes the plan of a profile.

    Raises:
        ConfigurationError: the version that is named cannot be continued, or the share is none.
        ArtifactError: there is no such version, or an adapter, a dataset or the registry is damaged.
    """
    if not 0 <= replay_fraction < 1:
        raise ConfigurationError(
            f"{replay_fraction:g} is no share of records", where="replay_fraction", remedy="Use 0 to below 1"
        )
    given = overrides.model_dump(mode="json", exclude_none=True)
    asked = sha256_json([dataset.fingerprint, base_model.fingerprint, init_from, replay_fraction, method, given])
    registry = settings.layout.registry
    decided = _decided(settings, dataset.date, asked)
    version: RegisteredVersion | None
    if init_from != "champion":
        version = get_version(registry, init_from)
    elif decided:
        version = get_version(registry, decided.version) if decided.version else None
    else:
        version = champion_before(registry, dataset.date)
    reason = decided.reason if decided else "no version that was trained on an earlier date has reigned yet"
    if version is not None:
        try:
            plan = continued_plan(
                version,
                dataset=dataset,
                base_model=base_model,
                layout=settings.layout,
                replay_fraction=replay_fraction,
                method=method,
                # Losses of both are measured at the same length.
                overrides=overrides.model_copy(update={"max_length": ordinary.trial_config.max_length}),
                deletions=deletions_of(settings),
                id_field=settings.id_field,
                make_plan=make_plan,
            )
        except ConfigurationError as error:
            if init_from != "champion":
                raise
            reason = error.what
        else:
            start = Start(asked=asked, version=version.version, reason=plan.explanations[-1])
            return plan.model_copy(update={"start": start})
    start = Start(asked=asked, version=None, reason=reason)
    explanations = [*ordinary.explanations, f"starts from the base model: {reason}"]
    return ordinary.model_copy(update={"start": start, "explanations": explanations})


def deletions_of(settings: Settings) -> Deletions:
    """What must not be learned, with the contents of the exports' records that the list names by their ids.

    Raises:
        ConfigurationError: the list cannot be read.
        DatasetError: an export cannot be read.
    """
    listed = settings.prepare_parameters.deletions()
    if not listed:
        return listed
    return with_contents(listed, discover_exports(settings.exports, settings.pattern), settings.id_field)


def _decided(settings: Settings, date: str, asked: str) -> Start | None:
    """What the date's plan decided, if it was asked the same."""
    before = read_value(settings, "training_plan", date, TrainingPlan)
    return before.start if before and before.start and before.start.asked == asked else None
