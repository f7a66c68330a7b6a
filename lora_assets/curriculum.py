"""A curriculum on this platform: stage after stage, each from the adapter before, and the same data shuffled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from finetune.chat.encode import RecordEncoder
from finetune.dataset.chosen import choose_records
from finetune.dataset.models import PreparedDataset
from finetune.dataset.profile import profile_dataset
from finetune.errors import ArtifactError
from finetune.evaluation.losses import RecordLosses, read_losses
from finetune.evaluation.models import EvalReport
from finetune.planning.cost import refuse_above
from finetune.planning.models import TrainingPlan
from finetune.progress import Progress, ProgressEvent
from finetune.publishing import find_published, is_complete, sha256_file
from finetune.search.candidates import Bench, plan_of
from finetune.search.curriculum.adapter import publish_adapter
from finetune.search.curriculum.base_losses import BaseLosses
from finetune.search.curriculum.difficulty import Records, read_facts
from finetune.search.curriculum.lessons import Lesson, Lessons, lay_out, stages_by_difficulty, stages_of_exports
from finetune.search.curriculum.report import (
    KIND,
    CurriculumReport,
    LessonOutcome,
    change,
    conclude,
    dry_run_result,
    publish_curriculum_report,
    report_inputs,
    result_of,
    verdict_of,
)
from finetune.search.curriculum.spec import CurriculumSpec
from finetune.search.curriculum.stage_files import FileCounts, StageFiles, prepare_stage_files
from finetune.search.models import StepResult
from finetune.search.traced import curriculum_figures
from finetune.training.init_adapter import read_init_adapter
from finetune.training.models import InitAdapter
from lora_assets.laboratory import Laboratory, Trained, evaluate, request_for, train
from lora_assets.manifests import manifest_of
from lora_assets.settings import Settings
from lora_assets.start import deletions_of
from resources.run_log import RunLog


@dataclass(frozen=True)
class Curriculum:
    """A curriculum with all that its trainings need; `source` holds the records of all stages."""

    name: str
    spec: CurriculumSpec
    bench: Bench
    source: PreparedDataset
    stage_files: StageFiles | None
    plan: TrainingPlan

    @property
    def files(self) -> list[FileCounts]:
        """What became of the stages' files, where they name some."""
        return self.stage_files.files if self.stage_files else []


@dataclass(frozen=True)
class _Made:
    """A training of a curriculum with its evaluation."""

    lesson: Lesson
    trained: Trained
    report: EvalReport
    losses: RecordLosses


def open_curriculum(settings: Settings, spec: CurriculumSpec, bench: Bench, on_progress: Progress) -> Curriculum:
    """Name a curriculum, prepare its stages' files where it has some, and plan it; nothing is trained.

    The plan does not depend on what earlier trainings took, so that an interrupted curriculum goes on with the same.

    Raises:
        ConfigurationError: the plan contradicts itself, or does not fit the memory.
        DatasetError: a stage's file cannot be read, or a stage has no record.
    """
    bench = replace(bench, tokens_per_second=spec.tokens_per_second or bench.tokens_per_second)
    found, named = None, spec
    planned_on = replace(bench, measurements=())
    if spec.source == "files":
        found = prepare_stage_files(
            spec,
            bench.dataset,
            settings.layout,
            settings.prepare_parameters,
            on_progress,
            # A record of the exports that is on the list by its id may stand in a file without one.
            deletions_of(settings) if settings.exports.is_dir() else None,
        )
        encoder = RecordEncoder.load(bench.base_model.path)
        profile = profile_dataset(found.dataset, encoder=encoder, on_progress=on_progress)
        planned_on = replace(planned_on, dataset=found.dataset, profile=profile)
        named = spec.pinned({each.file: each.sha256 for each in found.files})
    source = found.dataset if found else bench.dataset
    plan = plan_of(spec, planned_on, {}, method=spec.method)
    name = named.identity(source.fingerprint, bench.dataset.fingerprint, bench.base_model.fingerprint)
    return Curriculum(f"curriculum-{name}", spec, bench, source, found, plan)


def price_curriculum(settings: Settings, curriculum: Curriculum, on_progress: Progress) -> StepResult:
    """All trainings of a curriculum priced; no training library is needed, so no base losses are measured.

    Raises:
        ConfigurationError: an export is not there, or there is nothing to order by.
        DatasetError: a record has no score, or a stage no record.
    """
    _, lessons = _lay_out(curriculum, _base_losses(settings, curriculum, on_progress), on_progress, measured=False)
    return dry_run_result(curriculum.name, curriculum.spec, lessons, curriculum.files)


def run_curriculum(
    settings: Settings,
    curriculum: Curriculum,
    run_log: RunLog,
    on_progress: Progress,
    *,
    dagster_run_id: str | None = None,
) -> StepResult:
    """Train and evaluate all stages and the same data shuffled, publish the last adapter and the report.

    Whatever was made before is taken as it is; a training that was killed goes on from its last checkpoint.

    Args:
        settings: in force.
        curriculum: opened.
        run_log: has a row for every training.
        on_progress: told of all that is done.
        dagster_run_id: the Dagster run, if there is one.

    Raises:
        ConfigurationError: all trainings that are not there yet would together take longer than they may.
        FinetuneError: as trainings and evaluations raise.
    """
    bench, layout = curriculum.bench, settings.layout
    records, lessons = _measured(settings, curriculum, on_progress)
    longest = curriculum.plan.trial_config.max_length
    laboratory = Laboratory(
        bench,
        settings,
        run_log,
        label=curriculum.name.replace("-", " ", 1),
        dagster_run_id=dagster_run_id,
        exports=curriculum.spec.dataset_path.parent if curriculum.spec.dataset_path else None,
    )

    def dataset_of(lesson: Lesson) -> PreparedDataset:
        return choose_records(curriculum.source, lesson.rows, records.offsets, layout)

    if left := _not_trained(laboratory, lessons, dataset_of):
        refuse_above(lessons.total(left), settings.max_gpu_hours)

    def make(lesson: Lesson, init: InitAdapter | None) -> _Made:
        told = _prefixed(lesson.name, on_progress)
        trained = train(laboratory, lesson.plan, dataset=dataset_of(lesson), init_adapter=init, on_progress=told)
        request = trained.request
        report = evaluate(laboratory, request.adapter_dir, run_id=request.run_id, max_length=longest, on_progress=told)
        return _Made(lesson, trained, report, read_losses(report.path))

    stages: list[_Made] = []
    for lesson in lessons.stages:
        stages.append(make(lesson, _start(stages[-1].trained) if stages else None))
    shuffled = make(lessons.shuffled, None)
    report = _report(settings, curriculum, lessons, stages, shuffled)
    publish_adapter(report, stages[-1].trained.request, [stage.trained.result for stage in stages])
    directory = layout.experiment(curriculum.name)
    if find_published(directory, kind=KIND, inputs=report_inputs(report)) is None:
        manifest = manifest_of(
            settings,
            curriculum.spec,
            kind="curriculum_adapter",
            name=curriculum.name,
            trainings={each.adapter_path: [each.evaluation] for each in (*report.stages, report.shuffled)},
            figures=curriculum_figures(report),
        )
        publish_curriculum_report(directory, report, manifest)
    return result_of(report, directory)


def _measured(settings: Settings, curriculum: Curriculum, on_progress: Progress) -> tuple[Records, Lessons]:
    """The lessons, for which base losses are measured where they are missing; the model is then let go of."""
    losses = _base_losses(settings, curriculum, on_progress)
    records, lessons = _lay_out(curriculum, losses, on_progress, measured=False)
    if lessons.measuring is None:
        return records, lessons
    refuse_above(lessons.total(), settings.max_gpu_hours)
    return _lay_out(curriculum, losses, on_progress, measured=True)


def _lay_out(
    curriculum: Curriculum, losses: BaseLosses, on_progress: Progress, *, measured: bool
) -> tuple[Records, Lessons]:
    spec, source = curriculum.spec, curriculum.source
    encoder = RecordEncoder.load(curriculum.bench.base_model.path)
    measure = losses if measured else losses.kept
    records = read_facts(source.train_path, spec, encoder, measure, on_progress, partly=not measured)
    if curriculum.stage_files is not None:
        stage_of = curriculum.stage_files.stage_of
    else:
        stage_of = stages_of_exports(spec, source) if spec.source == "exports" else stages_by_difficulty(spec, records)
    return records, lay_out(spec, records, stage_of, curriculum.plan, curriculum.bench)


def _base_losses(settings: Settings, curriculum: Curriculum, on_progress: Progress) -> BaseLosses:
    base_model = curriculum.bench.base_model
    return BaseLosses(
        settings.layout.base_losses,
        base_model,
        max_length=curriculum.plan.trial_config.max_length,
        pad_token_id=RecordEncoder.load(base_model.path).pad_token_id,
        on_progress=on_progress,
    )


def _not_trained(
    laboratory: Laboratory, lessons: Lessons, dataset_of: Callable[[Lesson], PreparedDataset]
) -> list[Lesson]:
    """The trainings that are not there yet; a stage is not while the one before it is not."""
    left: list[Lesson] = []
    init: InitAdapter | None = None
    for lesson in lessons.stages:
        request = request_for(laboratory, lesson.plan, dataset=dataset_of(lesson), init_adapter=init)
        if left or not is_complete(request.adapter_dir):
            left.append(lesson)
        else:
            init = read_init_adapter(request.adapter_dir)
    request = request_for(laboratory, lessons.shuffled.plan, dataset=dataset_of(lessons.shuffled))
    return left if is_complete(request.adapter_dir) else [*left, lessons.shuffled]


def _prefixed(stage: str, on_progress: Progress) -> Progress:
    def tell(event: ProgressEvent) -> None:
        on_progress(replace(event, stage=f"{stage}: {event.stage}"))

    return tell


def _start(trained: Trained) -> InitAdapter:
    return InitAdapter(path=trained.request.adapter_dir, run_id=trained.request.run_id, adapter_hash=_hash_of(trained))


def _hash_of(trained: Trained) -> str:
    found = trained.result.adapter_hash
    if found is None:
        raise ArtifactError(
            "the adapter's manifest names no hash", where=trained.request.adapter_dir, remedy="Train it again"
        )
    return found


def _report(
    settings: Settings, curriculum: Curriculum, lessons: Lessons, stages: Sequence[_Made], shuffled: _Made
) -> CurriculumReport:
    bench, seed = curriculum.bench, curriculum.plan.trial_config.seed
    befores = [stages[0].losses.base_nats, *(stage.losses.nats for stage in stages[:-1])]
    outcomes = [_outcome(stage, before, seed) for stage, before in zip(stages, befores, strict=True)]
    rival = _outcome(shuffled, shuffled.losses.base_nats, seed)
    difference, ci95 = change(shuffled.losses.nats, stages[-1].losses, seed=seed)
    last = stages[-1]
    run_ids = [outcome.run_id for outcome in outcomes]
    return CurriculumReport(
        name=curriculum.name,
        specification=curriculum.spec.model_dump(mode="json"),
        base_model=bench.base_model,
        base_loss=last.report.base_loss,
        dataset_path=curriculum.source.path,
        dataset_fingerprint=curriculum.source.fingerprint,
        held_out_path=bench.dataset.eval_path,
        held_out_sha256=last.report.dataset_sha256,
        held_out_records=last.report.records,
        stages=outcomes,
        shuffled=rival,
        left_out=lessons.left_out,
        files=curriculum.files,
        difference=difference,
        difference_ci95=ci95,
        verdict=verdict_of(ci95, last.report.records),
        conclusion=conclude(outcomes, rival, ci95, last.report.records),
        adapter_path=settings.layout.adapter(curriculum.name),
        adapter_hash=_hash_of(last.trained),
        figures={
            "held_out.png": [*run_ids, rival.run_id],
            "difference": [run_ids[-1], rival.run_id],
            **{
                f"change of {stage.name}": [each for each in (stage.began_with, stage.run_id) if each]
                for stage in outcomes
            },
        },
    )


def _outcome(made: _Made, before: Sequence[float], seed: int) -> LessonOutcome:
    request, result, lesson = made.trained.request, made.trained.result, made.lesson
    trial = request.plan.trial_config
    changed, ci95 = change(before, made.losses, seed=seed)
    return LessonOutcome(
        name=lesson.name,
        records=len(lesson.rows),
        replayed=lesson.replayed,
        difficulty=lesson.span,
        epochs=trial.epochs,
        learning_rate=trial.learning_rate,
        steps=result.training_steps,
        tokens=result.tokens_seen or 0,
        gpu_hours=made.trained.hours,
        final_loss=result.final_loss,
        eval_loss=made.report.eval_loss,
        change=changed,
        change_ci95=ci95,
        run_id=request.run_id,
        began_with=request.init_adapter.run_id if request.init_adapter else None,
        adapter_path=request.adapter_dir,
        adapter_hash=_hash_of(made.trained),
        dataset_path=request.dataset.path,
        dataset_fingerprint=request.dataset.fingerprint,
        evaluation=made.report.path,
        evaluation_sha256=sha256_file(made.report.path / "report.json"),
    )
