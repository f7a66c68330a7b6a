"""Base against adapter, and against the reigning champion, on held-out records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.dataset.records import record_format, source_of
from finetune.errors import ArtifactError
from finetune.evaluation.adapters import attached, check_adapter, load_base
from finetune.evaluation.figures import answer_figures, groups, length_bucket, perplexity, worst
from finetune.evaluation.generation import greedy_answers
from finetune.evaluation.heldout import HeldOut, Question, read_heldout, sample_questions
from finetune.evaluation.models import Answer, ChampionComparison, ChampionRef, EvalReport
from finetune.evaluation.plots import change_by_record_png, loss_histogram_png
from finetune.evaluation.regressions import Regression, failures, fingerprint, read_regressions
from finetune.evaluation.report import render_report
from finetune.evaluation.scoring import Scores, score
from finetune.evaluation.statistics import bootstrap_ci95
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import is_complete, publish_directory, read_manifest, sha256_file, sha256_json
from finetune.registry.hashing import adapter_hash

_KIND = "evaluation"
# Part of what decides whether a report can be used again: raise it when figures change their meaning.
_METHOD = 1
_RESAMPLES = 2000
_SOURCES = 20
_LONGEST_ANSWER = 128


def evaluate_adapter(
    *,
    base_model: BaseModelRef,
    adapter_path: Path,
    dataset: Path,
    output_dir: Path,
    run_id: str,
    champion: ChampionRef | None = None,
    regressions: Path | None = None,
    max_length: int,
    on_progress: Progress = ignore_progress,
    sample_answers: int = 12,
    seed: int = 42,
) -> EvalReport:
    """Compare an adapter with its base model, and with the reigning champion, on the same records.

    The model is loaded once: bare it is the base, then each adapter is put on and taken off. Losses are
    in nats per trained token, summed over all records, with training's own encoding. Publishes
    ``report.json``, ``report.html`` and the plots; a complete `output_dir` made from the same inputs
    is used again.

    Args:
        base_model: the base model.
        adapter_path: an adapter in PEFT's layout.
        dataset: held-out records, JSONL.
        output_dir: where the report is published.
        run_id: the training's id.
        champion: the reigning champion; compared if it is another adapter of the same base model.
        regressions: a directory of fixed prompts (`finetune.evaluation.regressions`) to put to the adapter.
        max_length: records are cut at so many tokens, as in training.
        on_progress: told of every batch.
        sample_answers: how many held-out questions are answered side by side.
        seed: of the bootstrap and of the sample of questions.

    Raises:
        DatasetError: no held-out record can be scored.
        ConfigurationError: the regression prompts are not as they should be.
        BaseModelError: the base model cannot be loaded.
        ArtifactError: an adapter is damaged, does not fit the base model, or gives losses that are no numbers.
    """
    check_adapter(adapter_path)
    hash_of_adapter = adapter_hash(adapter_path)
    reigns_already = champion is not None and champion.adapter_hash == hash_of_adapter
    if champion is not None and (reigns_already or champion.base_fingerprint != base_model.fingerprint):
        champion = None
    cases = [] if regressions is None else read_regressions(regressions)
    inputs = {
        "base_fingerprint": base_model.fingerprint,
        "adapter_hash": hash_of_adapter,
        "dataset_sha256": sha256_file(dataset) if dataset.is_file() else None,
        "regressions": fingerprint(cases),
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
    if known is not None and (reigns_already or _compared_with(known) == _hash_of(champion)):
        return known

    started = time.monotonic()
    encoder = RecordEncoder.load(base_model.path)
    held_out = read_heldout(dataset, encoder, max_length=max_length)
    questions = sample_questions(held_out.records, encoder, count=sample_answers, max_length=max_length, seed=seed)
    model = load_base(base_model)
    measure = _Measure(
        held_out=held_out,
        questions=questions,
        encoder=encoder,
        vocabulary=model.config.get_text_config().vocab_size,
        on_progress=on_progress,
        rounds=2 if champion is None else 3,
    )
    base_scores, base_answers = measure.scores(model, "the base model", base_model.path), measure.answers(model)
    with attached(model, adapter_path) as adapted:
        scores, answers = measure.scores(adapted, "the adapter", adapter_path), measure.answers(adapted)
        failed = failures(cases, _regression_answers(adapted, encoder, cases))

    def interval(other: Scores) -> tuple[float, float]:
        return bootstrap_ci95(scores.nats - other.nats, scores.tokens, resamples=_RESAMPLES, seed=seed)

    comparison = None
    if champion is not None:
        with attached(model, champion.adapter_path) as reigning:
            rival = measure.scores(reigning, f"the champion {champion.version}", champion.adapter_path)
        comparison = ChampionComparison(
            version=champion.version,
            adapter_hash=champion.adapter_hash,
            champion_loss=rival.loss,
            delta_vs_champion=scores.loss - rival.loss,
            delta_ci95=interval(rival),
        )

    report = EvalReport(
        path=output_dir,
        run_id=run_id,
        eval_loss=scores.loss,
        eval_perplexity=perplexity(scores.loss),
        base_loss=base_scores.loss,
        base_perplexity=perplexity(base_scores.loss),
        delta_vs_base_loss=scores.loss - base_scores.loss,
        delta_ci95=interval(base_scores),
        token_accuracy=scores.accuracy,
        base_token_accuracy=base_scores.accuracy,
        **answer_figures(questions, base_answers, answers),
        records=len(held_out.records),
        tokens=int(scores.tokens.sum()),
        seconds=time.monotonic() - started,
        answers=[
            Answer(prompt=question.prompt, reference=question.reference, base=base, adapter=ours)
            for question, base, ours in zip(questions, base_answers, answers, strict=True)
        ],
        base_fingerprint=base_model.fingerprint,
        adapter_hash=hash_of_adapter,
        dataset_sha256=str(inputs["dataset_sha256"]),
        champion=comparison,
        by_format=groups([record_format(record) for record in held_out.records], base_scores, scores),
        by_source=groups([source_of(record) or "(none)" for record in held_out.records], base_scores, scores)[
            :_SOURCES
        ],
        by_length=sorted(
            groups([length_bucket(len(record.input_ids)) for record in held_out.encoded], base_scores, scores),
            key=lambda group: int(group.name.split("–")[0]),
        ),
        worst=worst(held_out, base_scores, scores),
        regressions=len(cases),
        failed_regressions=failed,
        truncated=held_out.truncated,
        skipped=held_out.skipped,
    )
    base_means, means = base_scores.nats / base_scores.tokens, scores.nats / scores.tokens
    plots = {
        "losses.png": loss_histogram_png(base_means, means),
        "change.png": change_by_record_png(base_means, means),
    }
    with publish_directory(output_dir, kind=_KIND) as staging:
        staging.inputs, staging.parameters = inputs, parameters
        staging.results = {name: getattr(report, name) for name in ("eval_loss", "base_loss", "delta_vs_base_loss")}
        for name, picture in plots.items():
            (staging.path / name).write_bytes(picture)
        (staging.path / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        page = render_report(report, base_model=base_model, dataset=dataset, plots=plots)
        (staging.path / "report.html").write_text(page, encoding="utf-8")
    return report


class _Measure:
    """The same records and questions, put to one model after another."""

    def __init__(
        self,
        *,
        held_out: HeldOut,
        questions: Sequence[Question],
        encoder: RecordEncoder,
        vocabulary: int,
        on_progress: Progress,
        rounds: int,
    ) -> None:
        self._held_out = held_out
        self._questions = questions
        self._encoder = encoder
        self._vocabulary = vocabulary
        self._on_progress = on_progress
        self._total = rounds * len(held_out.records)
        self._done = 0

    def scores(self, model: Any, name: str, where: Path) -> Scores:
        scores = score(
            model,
            self._held_out.encoded,
            vocabulary=self._vocabulary,
            pad_token_id=self._encoder.pad_token_id,
            after_batch=self._after_batch,
        )
        if not np.isfinite(scores.nats).all():
            broken = self._held_out.lines[int(np.flatnonzero(~np.isfinite(scores.nats))[0])]
            raise ArtifactError(
                f"{name} gives losses that are no numbers, first on line {broken} of the held-out records",
                where=where,
                remedy="Its weights hold NaN or infinity: train again with a lower learning rate",
            )
        return scores

    def answers(self, model: Any) -> list[str]:
        if not self._questions:
            return []
        longest = max(question.reference_tokens for question in self._questions)
        return greedy_answers(
            model,
            self._encoder,
            [question.prompt_ids for question in self._questions],
            max_new_tokens=min(longest + 8, _LONGEST_ANSWER),
        )

    def _after_batch(self, records: int) -> None:
        self._done += records
        self._on_progress(ProgressEvent("evaluate", self._done, self._total, "records"))


def _regression_answers(model: Any, encoder: RecordEncoder, cases: Sequence[Regression]) -> list[str]:
    if not cases:
        return []
    prompts = [encoder.encode_prompt(case.conversation) for case in cases]
    return greedy_answers(model, encoder, prompts, max_new_tokens=max(case.max_new_tokens for case in cases))


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
    return None if report.champion is None else report.champion.adapter_hash


def _hash_of(champion: ChampionRef | None) -> str | None:
    return None if champion is None else champion.adapter_hash
