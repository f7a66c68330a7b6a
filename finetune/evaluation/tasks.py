"""Tasks of EleutherAI's lm-evaluation-harness, put to a model that is loaded already."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigurationError, RemoteError
from finetune.evaluation.models import TaskScore
from finetune.publishing import sha256_file, sha256_json

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from torch.nn import Module

    from finetune.base_model.models import BaseModelRef

# Figures per task: "metric,filter" as the harness writes them; the rest of its keys are names and counts.
TaskFigures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class EvalTasks:
    """Which tasks are run: `names` of the harness's or of YAML files in `directory`."""

    names: Sequence[str]
    directory: Path | None = None

    def fingerprint(self) -> str | None:
        """Hash of the tasks' names, own files and the harness's version; None without tasks.

        Raises:
            ConfigurationError: the harness is not installed, or the directory is missing.
        """
        if not self.names:
            return None
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigurationError(
                "evaluation tasks need lm-eval, which is not installed",
                where="lm_eval",
                remedy="Install the extra: pip install 'lora-assets[lm-eval]', or unset EVAL_TASKS",
            )
        files = []
        if self.directory is not None:
            if not self.directory.is_dir():
                raise ConfigurationError(
                    "the directory of evaluation tasks is missing",
                    where=self.directory,
                    remedy="Create it, or set EVAL_TASKS_DIR to another one",
                )
            files = [
                [path.relative_to(self.directory).as_posix(), sha256_file(path)]
                for path in sorted(self.directory.rglob("*"))
                if path.is_file()
            ]
        return sha256_json([list(self.names), files, importlib.metadata.version("lm_eval")])


def find_tasks(tasks: EvalTasks) -> TaskManager | None:
    """The harness's index that knows the tasks; None without tasks.

    Raises:
        ConfigurationError: the harness knows no such task.
    """
    if not tasks.names:
        return None
    from lm_eval.tasks import TaskManager

    own = None if tasks.directory is None else str(tasks.directory)
    unknown = list(tasks.names)
    # Reading the harness's thousands of files takes seconds, which own tasks do not need.
    for defaults in (False, True):
        manager = TaskManager(include_path=own, include_defaults=defaults)
        unknown = [name for name in tasks.names if name not in manager.all_tasks]
        if not unknown:
            return manager
    raise ConfigurationError(
        f"lm-eval knows no task {', '.join(unknown)}",
        where="EVAL_TASKS",
        remedy="`lm-eval ls tasks` lists the harness's; your own are YAML files in EVAL_TASKS_DIR",
    )


def run_tasks(
    model: Module, base_model: BaseModelRef, tasks: EvalTasks, manager: TaskManager | None, *, batch: int = 8
) -> TaskFigures:
    """Figures of a causal language model, with or without an adapter of PEFT, by task and metric.

    Prompts are the harness's own, without a chat template, so that figures compare with published ones.

    Args:
        model: in evaluation mode, on its device.
        base_model: where its tokenizer lies.
        tasks: what is run.
        manager: the index that knows them; nothing is run without it.
        batch: prompts at a time.

    Raises:
        ConfigurationError: the harness cannot read a task's data.
        RemoteError: the hub, where the data are, cannot be reached.
    """
    if manager is None:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        base_model.path, local_files_only=True, trust_remote_code=base_model.trust_remote_code
    )
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
    try:
        found = simple_evaluate(
            harness, tasks=list(tasks.names), task_manager=manager, log_samples=False, bootstrap_iters=0
        )
    except ConnectionError as error:
        raise RemoteError(
            f"the data of {', '.join(tasks.names)} cannot be fetched: {error}",
            where="EVAL_TASKS",
            remedy="Try again later, or where the hub can be reached: its cache is used from then on",
        ) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(
            f"lm-eval cannot run {', '.join(tasks.names)}: {error}",
            where="EVAL_TASKS",
            remedy="Correct the task's file, or take it out of EVAL_TASKS",
        ) from error
    return {task: _figures(results) for task, results in sorted(found["results"].items())}


def task_scores(base: TaskFigures, adapter: TaskFigures) -> list[TaskScore]:
    """One row for each task and metric."""
    return [
        TaskScore(task=task, metric=metric, base=base[task][metric], adapter=value)
        for task, figures in adapter.items()
        for metric, value in figures.items()
    ]


def _figures(results: dict[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    }
