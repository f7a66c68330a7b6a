"""Continual learning on this platform: going on from a champion beside training from scratch, both measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.dataset.prepare import load_prepared
from finetune.dataset.replay import known_lines
from finetune.errors import ConfigurationError
from finetune.evaluation.losses import RecordLosses, read_losses
from finetune.planning.cost import refuse_all_above
from finetune.planning.models import Method, TrainingPlan
from finetune.planning.overrides import PlanOverrides
from finetune.progress import Progress
from finetune.publishing import is_complete, sha256_file
from finetune.registry.champion import champion_before
from finetune.registry.models import RegisteredVersion
from finetune.registry.store import get_version
from finetune.search.candidates import Bench, plan_of
from finetune.search.continual.comparison import (
    Arm,
    ArmName,
    ContinualResult,
    ContinualSpec,
    Losses,
    concluded,
    measured,
    refuse_one_sided,
)
from finetune.search.continual.report import publish_report, read_report
from finetune.search.traced import continual_figures
from finetune.training.continuation import continued_plan, init_adapter_of
from finetune.training.models import TrainingRequest
from lora_assets.laboratory import Laboratory, evaluate, request_for, train
from lora_assets.manifests import manifest_of
from lora_assets.settings import Settings
from lora_assets.start import deletions_of


def of_settings(spec: ContinualSpec, settings: Settings) -> ContinualSpec:
    """The specification with what the settings say of every training, where it says nothing itself.

    The training from scratch is the date's ordinary one then, and is not repeated where that was made.
    """
    given = PlanOverrides(
        lora_rank=settings.lora_rank,
        epochs=settings.train_epochs,
        learning_rate=settings.learning_rate,
        max_length=settings.max_length,
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        seed=settings.seed,
    )
    fixed = given.model_copy(update=spec.fixed.model_dump(exclude_none=True))
    task = spec.task if "task" in spec.model_fields_set else settings.training_task
    return spec.model_copy(update={"fixed": fixed, "task": task, "method": spec.method or settings.training_method})


def propose(settings: Settings, spec: ContinualSpec, bench: Bench) -> ContinualResult:
    """Plan and price the trainings; no training library is imported.

    Raises:
        ConfigurationError: there is no version to go on from, or it cannot be continued.
        DatasetError: no held-out record is old, or none is new.
        ArtifactError: an adapter, a dataset or the registry is damaged.
    """
    version = _version(settings, spec, bench)
    plans = _plans(settings, spec, bench, version)
    arms = [
        Arm(
            name=name,
            run_id=None,
            records=_dataset(bench, plan).counts.train,
            tokens=plan.estimated_tokens,
            steps=plan.estimated_steps,
            gpu_hours=plan.cost.gpu_hours if plan.cost else None,
            price=plan.cost.price if plan.cost else None,
        )
        for name, plan in plans.items()
    ]
    result = _opened(spec, bench, version, plans, arms)
    told = ", ".join(f"{arm.name} on {arm.records} records in {arm.steps} steps" for arm in arms)
    return result.model_copy(update={"status": "dry_run", "conclusion": f"would train {told}"})


def run_continual(laboratory: Laboratory, spec: ContinualSpec, on_progress: Progress) -> ContinualResult:
    """Train what is missing, evaluate everything on the same held-out records, and publish the report.

    What is there already is taken as it is: a report as a whole, each training, each evaluation.

    Raises:
        ConfigurationError: there is no version to go on from, it cannot be continued, or the trainings would take
            longer than they may.
        DatasetError: no held-out record is old, or none is new.
        FinetuneError: as trainings and evaluations raise.
    """
    settings, run_log = laboratory.settings, laboratory.run_log
    bench = laboratory.bench.measured(run_log.measurements(laboratory.bench.base_model.name, laboratory.bench.device))
    version = _version(settings, spec, bench)
    name = _name(spec, bench, version)
    laboratory = replace(laboratory, bench=bench, label=name)
    directory = settings.layout.experiment(name)
    # Whoever else works on it has published it by then.
    with run_log.lease(name, on_progress=on_progress):
        if known := read_report(directory):
            return known
        plans = _plans(settings, spec, bench, version)
        asked = [_request(laboratory, plan) for plan in plans.values()]
        todo = [request.plan for request in asked if not is_complete(request.adapter_dir)]
        refuse_all_above(todo, settings.max_gpu_hours)
        longest = plans["from scratch"].trial_config.max_length
        arms = [
            Arm(name="base model", run_id=None),
            _evaluated(
                laboratory,
                Arm(
                    name="champion",
                    run_id=version.run_id,
                    adapter_hash=version.adapter_hash,
                    dataset_fingerprint=version.lineage["dataset_fingerprint"],
                ),
                version.stored_path,
                longest,
                on_progress,
            ),
        ]
        for arm, plan in plans.items():
            arms.append(_trained(laboratory, arm, plan, longest, on_progress))
        losses = _losses(laboratory, version, arms)
        # The base model's losses stand in every report.
        arms[0] = arms[0].model_copy(
            update={"report_path": arms[1].report_path, "report_sha256": arms[1].report_sha256}
        )
        arms, changes = measured(arms, losses, seed=spec.seed)
        result = _opened(spec, bench, version, plans, arms).model_copy(
            update={
                "old_records": int(losses.old.sum()),
                "new_records": int((~losses.old).sum()),
                "changes": changes,
            }
        )
        result = result.model_copy(update={"conclusion": concluded(result)})
        places = {version.run_id: version.stored_path}
        manifest = manifest_of(
            settings,
            spec,
            kind="continual_report",
            name=name,
            seed=spec.seed,
            trainings={
                places.get(arm.run_id, settings.layout.adapter(arm.run_id)): [arm.report_path]
                for arm in arms
                if arm.run_id and arm.report_path
            },
            figures=continual_figures(result),
        )
        publish_report(directory, result, manifest)
    return result.model_copy(update={"path": directory})


def _version(settings: Settings, spec: ContinualSpec, bench: Bench) -> RegisteredVersion:
    registry = settings.layout.registry
    if spec.version is not None:
        return get_version(registry, spec.version)
    version = champion_before(registry, bench.dataset.date)
    if version is None:
        raise ConfigurationError(
            f"no version that was trained on a date before {bench.dataset.date} has reigned yet",
            where=registry,
            remedy="Choose a later date, or name a version",
        )
    return version


def _name(spec: ContinualSpec, bench: Bench, version: RegisteredVersion) -> str:
    fingerprints = bench.dataset.fingerprint, bench.base_model.fingerprint
    return f"continual-{spec.identity(*fingerprints, version.adapter_hash)}"


def _plans(
    settings: Settings, spec: ContinualSpec, bench: Bench, version: RegisteredVersion
) -> dict[ArmName, TrainingPlan]:
    """The plan of each training, by what it is."""
    scratch = plan_of(spec, bench, {}, method=spec.method)
    # Losses are measured at one length.
    overrides = spec.fixed.model_copy(update={"max_length": scratch.trial_config.max_length})

    def make_plan(profile: DatasetProfile, *, method: Method | None, overrides: PlanOverrides) -> TrainingPlan:
        return plan_of(spec, replace(bench, profile=profile), overrides.model_dump(exclude_none=True), method=method)

    deletions = deletions_of(settings)

    def going_on(fraction: float) -> TrainingPlan:
        return continued_plan(
            version,
            dataset=bench.dataset,
            base_model=bench.base_model,
            layout=settings.layout,
            replay_fraction=fraction,
            method=spec.method,
            overrides=overrides,
            deletions=deletions,
            id_field=settings.id_field,
            make_plan=make_plan,
        )

    plans: dict[ArmName, TrainingPlan] = {"continued": going_on(spec.replay_fraction)}
    # Before hours of training rather than after.
    refuse_one_sided(_old(settings, bench, version))
    if spec.without_replay and spec.replay_fraction:
        plans["continued without replay"] = going_on(0.0)
    return {**plans, "from scratch": scratch}


def _dataset(bench: Bench, plan: TrainingPlan) -> PreparedDataset:
    return plan.continued.dataset if plan.continued else bench.dataset


def _request(laboratory: Laboratory, plan: TrainingPlan) -> TrainingRequest:
    dataset = _dataset(laboratory.bench, plan)
    return request_for(laboratory, plan, dataset=dataset, init_adapter=init_adapter_of(plan))


def _trained(laboratory: Laboratory, name: ArmName, plan: TrainingPlan, longest: int, on_progress: Progress) -> Arm:
    dataset = _dataset(laboratory.bench, plan)
    trained = train(laboratory, plan, dataset=dataset, init_adapter=init_adapter_of(plan), on_progress=on_progress)
    result = trained.result
    arm = Arm(
        name=name,
        run_id=result.run_id,
        adapter_hash=result.adapter_hash,
        dataset_fingerprint=dataset.fingerprint,
        records=dataset.counts.train,
        tokens=result.tokens_seen,
        steps=result.training_steps,
        gpu_hours=trained.hours,
    )
    return _evaluated(laboratory, arm, trained.request.adapter_dir, longest, on_progress)


def _evaluated(laboratory: Laboratory, arm: Arm, adapter: Path, longest: int, on_progress: Progress) -> Arm:
    report = evaluate(
        laboratory, adapter, run_id=arm.run_id or adapter.name, max_length=longest, on_progress=on_progress
    )
    return arm.model_copy(
        update={"report_path": report.path, "report_sha256": sha256_file(report.path / "report.json")}
    )


def _losses(laboratory: Laboratory, version: RegisteredVersion, arms: list[Arm]) -> Losses:
    """Each model's losses, record by record, and which records the version's own dataset held out."""
    read: dict[ArmName, RecordLosses] = {arm.name: read_losses(arm.report_path) for arm in arms if arm.report_path}
    first = read["champion"]
    return Losses(
        tokens=np.array(first.tokens),
        old=_old(laboratory.settings, laboratory.bench, version)[np.array(first.lines) - 1],
        nats={
            "base model": np.array(first.base_nats),
            **{name: np.array(losses.nats) for name, losses in read.items()},
        },
    )


def _old(settings: Settings, bench: Bench, version: RegisteredVersion) -> npt.NDArray[np.bool_]:
    """Which held-out records the version's own dataset held out too; shape (records,)."""
    lineage = version.lineage
    known = load_prepared(settings.layout.prepared(lineage["date"], lineage["dataset_fingerprint"]))
    return known_lines(bench.dataset.eval_path, known.eval_path)


def _opened(
    spec: ContinualSpec, bench: Bench, version: RegisteredVersion, plans: dict[ArmName, TrainingPlan], arms: list[Arm]
) -> ContinualResult:
    continued = plans["continued"].continued
    return ContinualResult(
        status="completed",
        name=_name(spec, bench, version),
        spec=spec,
        date=bench.dataset.date,
        version=version.version,
        known_date=version.lineage["date"],
        dataset_fingerprint=bench.dataset.fingerprint,
        base_model=bench.base_model.name,
        base_fingerprint=bench.base_model.fingerprint,
        trained_new=continued.new_records if continued else 0,
        trained_replayed=continued.replayed_records if continued else 0,
        arms=arms,
        conclusion="",
    )
