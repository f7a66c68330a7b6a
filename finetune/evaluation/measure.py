"""The same records and questions put to base, adapter and champion, on one load of the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.evaluation.adapters import attached, load_base
from finetune.evaluation.generation import greedy_answers
from finetune.evaluation.heldout import HeldOut, Question
from finetune.evaluation.models import ChampionRef, FailedRegression, TaskScore
from finetune.evaluation.regressions import Regression, failures
from finetune.evaluation.scorer import Scorer
from finetune.evaluation.scoring import Scores
from finetune.evaluation.tasks import EvalTasks, find_tasks, run_tasks, task_scores
from finetune.progress import Progress

if TYPE_CHECKING:
    from torch.nn import Module

_LONGEST_ANSWER = 128


@dataclass(frozen=True)
class Measured:
    """Scores of the held-out records, answers to the questions, and the regression prompts that failed."""

    base: Scores
    adapter: Scores
    champion: Scores | None
    base_answers: list[str]
    answers: list[str]
    failed_regressions: list[FailedRegression]
    tasks: list[TaskScore]


def measure(
    base_model: BaseModelRef,
    adapter_path: Path,
    *,
    champion: ChampionRef | None,
    encoder: RecordEncoder,
    held_out: HeldOut,
    questions: Sequence[Question],
    cases: Sequence[Regression],
    tasks: EvalTasks,
    on_progress: Progress,
) -> Measured:
    """Put everything to the base model, to the adapter, and the records to the champion too.

    Raises:
        ConfigurationError: a task cannot be run.
        RemoteError: a task's data cannot be fetched.
        BaseModelError: the base model cannot be loaded.
        ArtifactError: an adapter is damaged, does not fit the base model, or gives losses that are no numbers.
    """
    manager = find_tasks(tasks)
    model = load_base(base_model)
    total = (2 if champion is None else 3) * len(held_out.records)
    scorer = Scorer(encoder, "evaluate", total, on_progress)

    def scores(of: Module, name: str, where: Path) -> Scores:
        return scorer(of, held_out, name=name, where=where)

    base, base_answers = scores(model, "the base model", base_model.path), _answers(model, encoder, questions)
    base_tasks = run_tasks(model, base_model, tasks, manager)
    with attached(model, adapter_path) as adapted:
        adapter, answers = scores(adapted, "the adapter", adapter_path), _answers(adapted, encoder, questions)
        failed = failures(cases, _continuations(adapted, encoder, cases))
        found_tasks = task_scores(base_tasks, run_tasks(adapted, base_model, tasks, manager))
    rival = None
    if champion is not None:
        with attached(model, champion.adapter_path) as reigning:
            rival = scores(reigning, f"the champion {champion.version}", champion.adapter_path)
    return Measured(base, adapter, rival, base_answers, answers, failed, found_tasks)


def _answers(model: Module, encoder: RecordEncoder, questions: Sequence[Question]) -> list[str]:
    longest = max((question.reference_tokens for question in questions), default=0)
    prompts = [question.prompt_ids for question in questions]
    return greedy_answers(model, encoder, prompts, max_new_tokens=min(longest + 8, _LONGEST_ANSWER))


def _continuations(model: Module, encoder: RecordEncoder, cases: Sequence[Regression]) -> list[str]:
    longest = max((case.max_new_tokens for case in cases), default=1)
    prompts = [encoder.encode_prompt(case.conversation) for case in cases]
    return greedy_answers(model, encoder, prompts, max_new_tokens=longest)
