"""Base against adapter, and against the reigning champion, on held-out records."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.adapter_files import adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.errors import ArtifactError
from finetune.evaluation.adapters import check_adapter
from finetune.evaluation.figures import answer_figures, change_ci95, group_figures, loss_figures
from finetune.evaluation.heldout import HeldOut, other_prompts, read_heldout, sample_questions
from finetune.evaluation.losses import write_losses
from finetune.evaluation.measure import Measured, measure
from finetune.evaluation.models import ChampionComparison, ChampionRef, EvalReport
from finetune.evaluation.plots import change_by_record_png, loss_histogram_png
from finetune.evaluation.regressions import fingerprint, read_regressions
from finetune.evaluation.report import render_report
from finetune.evaluation.tasks import EvalTasks
from finetune.progress import Progress, ignore_progress
from finetune.publishing import is_complete, publish_directory, read_manifest, sha256_file, sha256_json

_KIND = "evaluation"
# Part of what decides whether a report can be used again: raise it when figures change their meaning.
_METHOD = 3


def evaluate_adapter(
    *,
    base_model: BaseModelRef,
    adapter_path: Path,
    dataset: Path,
    output_dir: Path,
    run_id: str,
    champion: ChampionRef | None = None,
    regressions: Path | None = None,
    tasks: EvalTasks | None = None,
    max_length: int,
    on_progress: Progress = ignore_progress,
    sample_answers: int = 12,
    seed: int = 42,
) -> EvalReport:
    """Compare an adapter with its base model, and with the reigning champion, each time on the same records.

    The model is loaded once: bare it is the base, then each adapter is put on and taken off. Losses are
    in nats per trained token, summed over all records, with training's own encoding. Publishes
    ``report.json``, ``report.html``, each record's losses and the plots; a complete `output_dir` made from
    the same inputs is used again.

    Args:
        base_model: the base model.
        adapter_path: an adapter in PEFT's layout.
        dataset: held-out records, JSONL.
        output_dir: where the report is published.
        run_id: the training's id.
        champion: the reigning champion; compared if it is another adapter of the same base model, on the records
            that it cannot know.
        regressions: a directory of fixed prompts (`finetune.evaluation.regressions`) to put to the adapter.
        tasks: tasks of lm-eval to run on base and adapter.
        max_length: records are cut at so many tokens, as in training.
        on_progress: told of every batch.
        sample_answers: how many held-out questions are answered side by side.
        seed: of the bootstrap and of the sample of questions.

    Raises:
        DatasetError: no held-out record can be scored.
        ConfigurationError: the regression prompts are not as they should be, or a task cannot be run.
        RemoteError: a task's data cannot be fetched.
        BaseModelError: the base model cannot be loaded.
        ArtifactError: an adapter is damaged, does not fit the base model, or gives losses that are no numbers.
    """
    check_adapter(adapter_path)
    hash_of_adapter = adapter_hash(adapter_path)
    reigns_already = champion is not None and champion.adapter_hash == hash_of_adapter
    if champion is not None and (reigns_already or champion.base_fingerprint != base_model.fingerprint):
        champion = None
    cases = [] if regressions is None else read_regressions(regressions)
    tasks = tasks or EvalTasks([])
    inputs = {
        "base_fingerprint": base_model.fingerprint,
        "adapter_hash": hash_of_adapter,
        "dataset_sha256": sha256_file(dataset) if dataset.is_file() else None,
        "regressions": fingerprint(cases),
        "tasks": tasks.fingerprint(),
    }
    parameters = {
        "method": _METHOD,
        "run_id": run_id,
        "max_length": max_length,
        "sample_answers": sample_answers,
        "seed": seed,
    }
    known = _published(output_dir, inputs, parameters)
    # A candidate that has become champion is not compared again: against itself there is nothing to win.
    if known is not None and (reigns_already or _compared_with(known) == _fingerprint(champion)):
        return known

    started = time.monotonic()
    encoder = RecordEncoder.load(base_model.path)
    held_out = read_heldout(dataset, encoder, max_length=max_length)
    questions = sample_questions(held_out.records, encoder, count=sample_answers, max_length=max_length, seed=seed)
    measured = measure(
        base_model,
        adapter_path,
        champion=champion,
        encoder=encoder,
        held_out=held_out,
        questions=questions,
        cases=cases,
        tasks=tasks,
        on_progress=on_progress,
    )
    report = EvalReport(
        path=output_dir,
        run_id=run_id,
        records=len(held_out.records),
        truncated=held_out.truncated,
        skipped=held_out.skipped,
        base_fingerprint=base_model.fingerprint,
        adapter_hash=hash_of_adapter,
        dataset_sha256=str(inputs["dataset_sha256"]),
        adapter_path=adapter_path.absolute(),
        dataset=dataset.absolute(),
        champion=_comparison(champion, held_out, measured, seed),
        **loss_figures(measured.base, measured.adapter, seed=seed),
        **answer_figures(questions, measured.base_answers, measured.answers),
        **group_figures(held_out, measured.base, measured.adapter),
        regressions=len(cases),
        failed_regressions=measured.failed_regressions,
        tasks=measured.tasks,
        seconds=time.monotonic() - started,
    )
    with publish_directory(output_dir, kind=_KIND) as staging:
        staging.inputs, staging.parameters = inputs, parameters
        staging.results = {name: getattr(report, name) for name in ("eval_loss", "base_loss", "delta_vs_base_loss")}
        _write(staging.path, report, measured, base_model, dataset)
        write_losses(staging.path, held_out, measured)
    return report


def _comparison(
    champion: ChampionRef | None, held_out: HeldOut, measured: Measured, seed: int
) -> ChampionComparison | None:
    if champion is None or measured.champion is None:
        return None
    compared = other_prompts(held_out, champion.learned)
    comparison = ChampionComparison(
        version=champion.version,
        adapter_hash=champion.adapter_hash,
        left_out=len(held_out.records) - len(compared),
        unknown=champion.unknown,
        fingerprint=champion.fingerprint,
    )
    if not len(compared):
        return comparison
    theirs, ours = measured.champion.of(compared), measured.adapter.of(compared)
    figures = {
        "champion_loss": theirs.loss,
        "delta_vs_champion": ours.loss - theirs.loss,
        "delta_ci95": change_ci95(theirs, ours, seed=seed),
    }
    return comparison.model_copy(update=figures)


def _write(directory: Path, report: EvalReport, measured: Measured, base_model: BaseModelRef, dataset: Path) -> None:
    base, adapter = measured.base.means, measured.adapter.means
    plots = {"losses.png": loss_histogram_png(base, adapter), "change.png": change_by_record_png(base, adapter)}
    for name, picture in plots.items():
        (directory / name).write_bytes(picture)
    (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    page = render_report(report, base_model=base_model, dataset=dataset, plots=plots)
    (directory / "report.html").write_text(page, encoding="utf-8")


def _published(output_dir: Path, inputs: dict[str, Any], parameters: dict[str, Any]) -> EvalReport | None:
    """The report that is there already, if it was made from the same inputs and is whole."""
    if not is_complete(output_dir):
        return None
    try:
        manifest = read_manifest(output_dir, kind=_KIND, verify="hashes")
        if sha256_json([manifest.inputs, manifest.parameters]) != sha256_json([inputs, parameters]):
            return None
        report = EvalReport.model_validate_json((output_dir / "report.json").read_bytes())
    except (ArtifactError, ValidationError):
        return None
    return report.model_copy(update={"path": output_dir, "reused": True})


def _compared_with(report: EvalReport) -> str | None:
    return None if report.champion is None else report.champion.fingerprint


def _fingerprint(champion: ChampionRef | None) -> str | None:
    return None if champion is None else champion.fingerprint
