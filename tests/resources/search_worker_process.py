"""A worker of an experiment whose trials are loops of a few steps, to be killed at a named moment.

    python -m tests.resources.search_worker_process DATABASE_URL DIRECTORY SPEC_JSON MOMENT SECONDS_PER_STEP

A trial's steps are its checkpoint: one line each in ``steps-NUMBER``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.planning.models import CostEstimate, MemoryEstimate, Range, TrainingPlan, TrialConfig
from finetune.progress import ProgressEvent
from finetune.search.candidates import Candidate
from finetune.search.ledger import trials_remaining
from finetune.search.models import TrialRecord
from finetune.search.spec import ExperimentSpec
from finetune.search.suggest import suggest
from finetune.search.watch import Watch
from resources.experiment import Experiment, Propose
from resources.search_worker import Outcome, work
from resources.study import StudyStore

SPACE = {"learning_rate": Range(low=1e-5, high=1e-2, log=True)}
STEPS = 9


def proposer(spec: ExperimentSpec, *, gpu_hours: float | None) -> Propose:
    """Proposes configurations at a price."""

    def propose(history: Any, remaining: float) -> Candidate | None:
        left = trials_remaining(history, spec.limits)
        params = suggest(history, SPACE, spec.strategy, remaining, left, seed=spec.seed)
        return None if params is None else Candidate(params, plan(gpu_hours))

    return propose


def plan(gpu_hours: float | None) -> TrainingPlan:
    return TrainingPlan(
        trial_config=TrialConfig(trial_id="t"),
        search_space={},
        memory_estimate=MemoryEstimate(
            vram_gb=0, fits=None, limit_gb=None, model_params=0, trainable_params=0, parts={}
        ),
        explanations=[],
        estimated_steps=STEPS,
        estimated_tokens=None,
        cost=CostEstimate(tokens_per_second=None, throughput="stated", gpu_hours=gpu_hours, price=None),
    )


def loop(directory: Path, seconds: float, at: Callable[[str], None]) -> Callable[[TrialRecord, Watch], Outcome]:
    """A training of nine steps that goes on where it was killed."""

    def run(trial: TrialRecord, watch: Watch) -> Outcome:
        log = directory / f"steps-{trial.number}"
        value = float(trial.params["learning_rate"])
        watch.held_out_loss = lambda model: value
        done = len(log.read_text().splitlines()) if log.exists() else 0
        for step in range(done + 1, STEPS + 1):
            time.sleep(seconds)
            with log.open("a") as stream:
                stream.write(f"{os.getpid()} {step}\n")
            watch.after_step(step, STEPS, None)  # type: ignore[arg-type]  # nothing is measured
            watch(ProgressEvent("training", step, STEPS, "steps"))
            if step == 5:
                at("training")
        return Outcome(value=value, metrics={"eval_loss": value}, run_id=f"r{trial.number}", adapter_path="a")

    return run


def main(url: str, directory: str, spec_json: str, moment: str, seconds: str) -> None:
    spec = ExperimentSpec.model_validate_json(spec_json)
    ended: list[str] = []
    flag = Path(directory) / f"struck-{moment}"

    def at(name: str) -> None:
        if name == "training" and moment == "paused":
            os.kill(os.getpid(), signal.SIGSTOP)
        # Not in the first trial, which an earlier process may have been killed in: that would be given up some time.
        if name == moment and ended:
            flag.write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

    hold, end = Experiment._hold, Experiment.end

    def killed_before_its_lease(self: Experiment, *arguments: Any) -> Any:
        at("added")
        return hold(self, *arguments)

    def killed_around_its_end(self: Experiment, *arguments: Any, **values: Any) -> None:
        at("trained")
        end(self, *arguments, **values)
        at("told")
        ended.append(self.name)

    Experiment._hold = killed_before_its_lease  # type: ignore[method-assign]
    Experiment.end = killed_around_its_end  # type: ignore[method-assign]
    store = StudyStore(database_url=url, data_dir="/nowhere")
    experiment = store.open_experiment("e1", spec, SPACE, lease_seconds=5.0)
    reason = work(
        experiment,
        proposer(spec, gpu_hours=0.01),
        loop(Path(directory), float(seconds), at),
        on_progress=lambda event: print(event, flush=True),
        interval=0.5,
    )
    print("over", reason, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
