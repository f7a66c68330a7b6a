"""An ensemble on this platform: its members as trainings like any other, their combination, its report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.dataset.folds import without_fold
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.errors import ArtifactError, TrainingError
from finetune.evaluation.adapters import check_adapter
from finetune.evaluation.losses import RecordLosses, read_losses
from finetune.evaluation.models import EvalReport
from finetune.planning.cost import refuse_all_above
from finetune.planning.models import TrainingPlan
from finetune.progress import Progress, ProgressEvent
from finetune.publishing import is_complete, sha256_file, withdraw
from finetune.search.candidates import Bench, plan_of, priced
from finetune.search.ensemble.judging import Halves, figures, halves, judge, mean_loss
from finetune.search.ensemble.mixing import mix
from finetune.search.ensemble.report import publish_combination, publish_report, read_report
from finetune.search.ensemble.result import EnsembleResult, Evaluated, Member, Verdict
from finetune.search.ensemble.spec import EnsembleSpec, MemberSpec
from finetune.search.traced import combination_of, ensemble_figures
from lora_assets.laboratory import Laboratory, evaluate, request_for, train
from lora_assets.manifests import manifest_of


def propose(spec: EnsembleSpec, bench: Bench) -> EnsembleResult:
    """Plan and price every member; no training library is imported.

    Raises:
        ConfigurationError: a configuration contradicts itself, or does not fit the memory.
    """
    members = []
    for each, plan in _plans(spec, bench):
        cost = plan.cost
        members.append(
            _planned(each, plan).model_copy(
                update={"gpu_hours": cost.gpu_hours if cost else None, "price": cost.price if cost else None}
            )
        )
    # Without its weights the base model has another fingerprint, and so the ensemble another name.
    result = _opened(spec, bench, members).model_copy(update={"status": "dry_run", "name": ""})
    hours = "unknown time" if result.gpu_hours is None else f"{result.gpu_hours:.3g} GPU-hours"
    return result.model_copy(update={"reason": f"{len(members)} members would be trained, {hours}"})


def run_ensemble(laboratory: Laboratory, spec: EnsembleSpec, on_progress: Progress) -> EnsembleResult:
    """Train the members, combine them, and publish the report, and the adapter if it is better than its best member.

    What is there already is taken as it is: the report of an ensemble as a whole, each training, each evaluation.

    Raises:
        ConfigurationError: all trainings together would take longer than MAX_GPU_HOURS; nothing was trained.
        TrainingError: no member could be trained.
        DatasetError: there are too few held-out records, or a fold without any.
        FinetuneError: as trainings and evaluations raise.
    """
    layout = laboratory.settings.layout
    known = laboratory.run_log.measurements(laboratory.bench.base_model.name, laboratory.bench.device)
    bench = laboratory.bench.measured(known)
    name = _name(spec, bench)
    # Whoever else works on it has published it by then.
    with laboratory.run_log.lease(name, on_progress=on_progress):
        if published := read_report(layout.experiment(name)):
            return published
        plans = _plans(spec, bench)
        datasets = [_dataset(laboratory, each, len(plans)) for each, _ in plans]
        _refuse_too_long(laboratory, [plan for _, plan in plans], datasets)
        # Records are cut at one length, so that losses can be compared.
        longest = max(plan.trial_config.max_length for _, plan in plans)
        members: list[Member] = []
        for (each, plan), dataset in zip(plans, datasets, strict=True):
            on_progress(ProgressEvent("members", len(members), len(plans), "members"))
            members.append(_trained(laboratory, each, plan, dataset, on_progress))
        measured = _measured(laboratory, spec, members, longest, on_progress)
        work = layout.work(name)
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work) as combined:
            result = _combined(laboratory, spec, measured, Path(combined), longest, on_progress)
            if result.verdict and result.verdict.published:
                result = result.model_copy(update={"status": "published", "adapter_path": layout.adapter(name)})
                publish_combination(Path(combined), layout.adapter(name), result, bench.base_model)
            elif is_complete(layout.adapter(name)):
                # Of an attempt with fewer members, or of one that was killed.
                withdraw(layout.adapter(name))
        shutil.rmtree(work, ignore_errors=True)
        manifest = manifest_of(
            laboratory.settings,
            spec,
            kind="ensemble_adapter",
            name=name,
            seed=spec.seed,
            trainings={
                each.adapter_path: [each.evaluated.report_path] if each.evaluated else []
                for each in result.members
                if each.adapter_path
            },
            figures=ensemble_figures(result),
            combinations=combination_of(result),
        )
        publish_report(layout.experiment(name), result, manifest)
    return result.model_copy(update={"path": layout.experiment(name)})


def _name(spec: EnsembleSpec, bench: Bench) -> str:
    return spec.name(bench.dataset.fingerprint, bench.base_model.fingerprint)


def _opened(spec: EnsembleSpec, bench: Bench, members: list[Member]) -> EnsembleResult:
    return EnsembleResult(
        status="not_published",
        name=_name(spec, bench),
        spec=spec,
        dataset_fingerprint=bench.dataset.fingerprint,
        base_model=bench.base_model.name,
        base_fingerprint=bench.base_model.fingerprint,
        members=members,
    )


def _plans(spec: EnsembleSpec, bench: Bench) -> list[tuple[MemberSpec, TrainingPlan]]:
    """Every member's plan; what was measured decides its cost alone: a killed ensemble goes on with the same."""
    members = spec.members
    if spec.diversity == "folds":
        bench = replace(bench, profile=_without_share(bench.profile, 1 / len(members)))
    new = bench.measured(())
    return [(member, priced(spec, plan_of(spec, new, member.params, method=spec.method), bench)) for member in members]


def _without_share(profile: DatasetProfile, share: float) -> DatasetProfile:
    """About what the profile is without a share of the records."""
    left = {
        name: round(value * (1 - share))
        for name in ("total_samples", "total_tokens")
        if (value := getattr(profile, name)) is not None
    }
    return profile.model_copy(update=left)


def _planned(member: MemberSpec, plan: TrainingPlan) -> Member:
    return Member(name=member.name, params=dict(member.params), fold=member.fold, training_steps=plan.estimated_steps)


def _dataset(laboratory: Laboratory, member: MemberSpec, count: int) -> PreparedDataset:
    dataset = laboratory.bench.dataset
    return dataset if member.fold is None else without_fold(dataset, member.fold, count, laboratory.settings.layout)


def _refuse_too_long(
    laboratory: Laboratory, plans: Sequence[TrainingPlan], datasets: Sequence[PreparedDataset]
) -> None:
    """See that the trainings that are left to do take no longer together than they may."""
    todo = [
        plan
        for plan, dataset in zip(plans, datasets, strict=True)
        if not is_complete(request_for(laboratory, plan, dataset=dataset).adapter_dir)
    ]
    refuse_all_above(todo, laboratory.settings.max_gpu_hours)


def _trained(
    laboratory: Laboratory, member: MemberSpec, plan: TrainingPlan, dataset: PreparedDataset, on_progress: Progress
) -> Member:
    """The member's training; one that goes wrong by itself, as by a rate at which it diverges, is left out."""
    planned = _planned(member, plan).model_copy(update={"dataset_fingerprint": dataset.fingerprint})
    try:
        trained = train(laboratory, plan, dataset=dataset, on_progress=on_progress)
    except TrainingError as error:
        return planned.model_copy(update={"fault": str(error)})
    return planned.model_copy(
        update={
            "run_id": trained.request.run_id,
            "adapter_path": trained.request.adapter_dir,
            "training_steps": trained.result.training_steps,
            "gpu_hours": trained.hours,
        }
    )


@dataclass(frozen=True)
class _Measured:
    """The members with their evaluations; `losses` by record are of those that can be used, by their place."""

    members: list[Member]
    losses: dict[int, RecordLosses]
    split: Halves

    @property
    def best(self) -> int:
        """The member of the lowest loss on the selection half: chosen on the other one, it would be lucky there."""
        return min(self.losses, key=self.selection_loss)

    def selection_loss(self, member: int) -> float:
        """In nats per token."""
        losses = self.losses[member]
        return mean_loss(losses.nats, losses.tokens, self.split.selection)


def _measured(
    laboratory: Laboratory, spec: EnsembleSpec, members: list[Member], max_length: int, on_progress: Progress
) -> _Measured:
    found, losses = list(members), {}
    split: Halves | None = None
    for index, member in enumerate(members):
        if member.adapter_path is None:
            continue
        check_adapter(member.adapter_path)
        try:
            report = evaluate(
                laboratory, member.adapter_path, run_id=member.run_id, max_length=max_length, on_progress=on_progress
            )
        except ArtifactError as error:
            # The adapter is whole: its losses are no numbers.
            found[index] = member.model_copy(update={"fault": error.what})
            continue
        losses[index] = read_losses(report.path)
        split = split or halves(laboratory.bench.dataset.eval_path, losses[index].lines)
        found[index] = member.model_copy(update={"evaluated": _evaluated(report, split, spec.seed)})
    if split is None:
        raise TrainingError(
            f"no member can be used: {found[0].fault}",
            where=_name(spec, laboratory.bench),
            remedy="Change what the members have in common, such as their learning rate",
        )
    return _Measured(found, losses, split)


def _evaluated(report: EvalReport, split: Halves, seed: int) -> Evaluated:
    losses = read_losses(report.path)
    return Evaluated(
        run_id=report.run_id,
        adapter_hash=report.adapter_hash,
        report_path=report.path,
        report_sha256=sha256_file(report.path / "report.json"),
        figures=figures(losses.nats, losses.tokens, split, seed=seed),
    )


def _combined(
    laboratory: Laboratory,
    spec: EnsembleSpec,
    measured: _Measured,
    output: Path,
    max_length: int,
    on_progress: Progress,
) -> EnsembleResult:
    """Weigh the members, write their combination to `output`, and judge it."""
    bench, members, split = laboratory.bench, list(measured.members), measured.split
    usable, best = list(measured.losses), measured.best
    mixed = mix(
        spec,
        [path for index in usable if (path := members[index].adapter_path)],
        [measured.selection_loss(index) for index in usable],
        base_model=bench.base_model,
        dataset=bench.dataset.eval_path,
        selection=split.selection,
        max_length=max_length,
        output=output,
        on_progress=on_progress,
    )
    for index, weight in zip(usable, mixed.weights, strict=True):
        members[index] = members[index].model_copy(update={"weight": weight})
    combination = None
    if mixed.is_one_member:
        verdict = Verdict(published=False, reason=f"{members[best].name} alone has a weight: nothing was combined")
    else:
        try:
            report = evaluate(
                laboratory, output, run_id=_name(spec, bench), max_length=max_length, on_progress=on_progress
            )
        except ArtifactError as error:
            verdict = Verdict(published=False, reason=error.what)
        else:
            combination = _evaluated(report, split, spec.seed)
            ours = read_losses(report.path)
            verdict = judge(ours, measured.losses[best], split, best_name=members[best].name, seed=spec.seed)
    base = measured.losses[best]
    return _opened(spec, bench, members).model_copy(
        update={
            "reason": verdict.reason,
            "best_member": members[best].name,
            "base": figures(base.base_nats, base.tokens, split, seed=spec.seed),
            "combination": combination,
            "verdict": verdict,
            "tastes": [taste.model_copy(update={"member": usable[taste.member]}) for taste in mixed.tastes],
            "selection_records": len(split.selection),
            "judging_records": len(split.judging),
        }
    )
