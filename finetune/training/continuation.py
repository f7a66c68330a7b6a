"""A plan that goes on with an earlier version: its weights, what is new to it, and a replay of what is not."""

from __future__ import annotations

from collections.abc import Callable

from finetune.adapter_files import adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.dataset.deletions import Deletions, named_lines
from finetune.dataset.models import PreparedDataset
from finetune.dataset.prepare import KIND
from finetune.dataset.profile import analyze
from finetune.dataset.replay import new_and_replayed
from finetune.errors import ArtifactError, ConfigurationError
from finetune.layout import DataLayout
from finetune.planning.model_config import read_model_shape
from finetune.planning.models import Continued, Method, TrainingPlan
from finetune.planning.overrides import PlanOverrides
from finetune.publishing import read_manifest
from finetune.registry.descent import ancestry
from finetune.registry.learned import dataset_of, datasets_behind, learned_prompts
from finetune.registry.models import RegisteredVersion
from finetune.training.init_adapter import differences, plan_like
from finetune.training.models import InitAdapter

# With which secrets and personal data are not learned.
_HIDING = ("mask", "reject")
# Makes the plan of a profile; called with `method` and `overrides` by name.
MakePlan = Callable[..., TrainingPlan]


def continued_plan(
    version: RegisteredVersion,
    *,
    dataset: PreparedDataset,
    base_model: BaseModelRef,
    layout: DataLayout,
    replay_fraction: float,
    method: Method | None,
    overrides: PlanOverrides,
    deletions: Deletions,
    id_field: str,
    make_plan: MakePlan,
) -> TrainingPlan:
    """The plan of a training that begins with a version's adapter, on what it has not seen and a replay of the rest.

    What is left open is as in that adapter: its method, rank, alpha, target modules and kind of LoRA.

    Args:
        version: whose adapter it begins with.
        dataset: the date's, with all that its window holds.
        base_model: the one in use.
        layout: where datasets lie.
        replay_fraction: share of records that the version knows, of all that are trained on.
        method: as given by a person, or None.
        overrides: as given by a person, and the `max_length` at which losses are measured.
        deletions: what must not be learned, with its contents (`finetune.dataset.deletions.with_contents`).
        id_field: the field of a record's id.
        make_plan: `finetune.planning.plan.make_plan`, with whatever else it needs.

    Raises:
        ConfigurationError: the version cannot be continued, and why.
        ArtifactError: its adapter or a dataset is damaged.
    """

    def refuse(why: str) -> ConfigurationError:
        return ConfigurationError(
            f"{version.version} cannot be continued: {why}",
            where=version.stored_path,
            remedy="Start from the base model, or name another version",
        )

    if version.status == "collected":
        raise refuse("its weights were removed to free space")
    if version.base_fingerprint != base_model.fingerprint:
        raise refuse(f"it was trained on another base model than {base_model.name}")
    known = dataset_of(version, layout)
    if known is None:
        raise refuse("the dataset that it was trained on is not there, so that nobody can tell what is new")
    if deletions and (why := _must_be_forgotten(version, layout, deletions, id_field)):
        raise refuse(why)
    if why := _would_leak(version, layout, dataset):
        raise refuse(why)
    if adapter_hash(version.stored_path) != version.adapter_hash:
        raise ArtifactError(
            f"the adapter of {version.version} was altered: its hash is no longer {version.adapter_hash[:12]}",
            where=version.stored_path,
            remedy="Restore the version from a backup, or roll back to another one",
        )
    like_method, like = plan_like(version.stored_path)
    mixed = new_and_replayed(dataset, known, fraction=replay_fraction, layout=layout)
    if mixed is None:
        raise refuse(f"no training record of {dataset.date} is new to it")
    plan = make_plan(
        analyze(mixed.dataset.train_path, format="jsonl", encoder=RecordEncoder.load(base_model.path)),
        method=method or like_method,
        overrides=like.model_copy(update=overrides.model_dump(exclude_none=True)),
    )
    shape = read_model_shape(base_model.path)
    if differing := differences(version.stored_path, plan.trial_config, shape, base_model):
        raise refuse("; ".join(differing))
    continued = Continued(
        version=version.version,
        run_id=version.run_id,
        adapter_hash=version.adapter_hash,
        adapter_path=version.stored_path,
        dataset=mixed.dataset,
        new_records=mixed.new,
        replayed_records=mixed.replayed,
    )
    told = (
        f"starts from {version.version} ({version.run_id}), with its method and size: {mixed.new} records are new to "
        f"it, {mixed.replayed} of {mixed.earlier} that it knows are replayed"
    )
    return plan.model_copy(update={"continued": continued, "explanations": [*plan.explanations, told]})


def init_adapter_of(plan: TrainingPlan) -> InitAdapter | None:
    """The adapter that the plan's training begins with, if it begins with one."""
    continued = plan.continued
    if continued is None:
        return None
    return InitAdapter(path=continued.adapter_path, run_id=continued.run_id, adapter_hash=continued.adapter_hash)


def _must_be_forgotten(
    version: RegisteredVersion, layout: DataLayout, deletions: Deletions, id_field: str
) -> str | None:
    """Why the version may know what must not be learned, itself or by those that it went on from, or None."""
    for each in ancestry(layout.registry, version):
        known = dataset_of(each, layout)
        if known is None:
            return f"nobody can tell whether {each.version} learned what is on the deletion list: its dataset is gone"
        if any(named_lines(known.train_path, deletions, id_field)):
            return f"{each.version} learned what is on the deletion list"
    return None


def _would_leak(version: RegisteredVersion, layout: DataLayout, dataset: PreparedDataset) -> str | None:
    """Why the version may know what the dataset holds out or does not show, itself or by its ancestors, or None."""
    ours = read_manifest(dataset.path, kind=KIND).parameters
    for each, known in datasets_behind(version, layout):
        if known is None:
            continue
        theirs = read_manifest(known.path, kind=KIND).parameters
        if ours.get("sensitive_data") in _HIDING and theirs.get("sensitive_data") not in _HIDING:
            return f"{each.version} was trained before sensitive data were looked for (SENSITIVE_DATA)"
        if learned := learned_prompts(known, dataset):
            return f"{each.version} was trained on {len(learned)} of the prompts that are held out now (EVAL_FRACTION)"
    return None
