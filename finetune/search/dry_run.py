"""An experiment without trainings: every trial proposed and priced."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.planning.models import Range
from finetune.search.candidates import Bench, next_candidate
from finetune.search.models import StepResult, TrialRecord
from finetune.search.spec import ExperimentSpec


def dry_run(spec: ExperimentSpec, bench: Bench, space: Mapping[str, Range]) -> StepResult:
    """Propose as many trials as may start, as if none had ended yet; no training library is imported.

    What a strategy would learn from results is not foretold: those trials are drawn at random.

    Raises:
        ConfigurationError: a configuration contradicts itself, or does not fit the memory.
    """
    proposed: list[TrialRecord] = []
    rows = []
    hours = price = 0.0
    known = True
    while len(proposed) < min(spec.max_trials, spec.max_loop_iterations):
        candidate = next_candidate(spec, bench, space, proposed, spec.budget_gpu_hours)
        if candidate is None:
            break
        trial, cost = candidate.plan.trial_config, candidate.plan.cost
        known &= candidate.gpu_hours is not None
        hours += candidate.gpu_hours or 0.0
        price += (cost.price if cost else None) or 0.0
        proposed.append(TrialRecord(number=len(proposed), params=candidate.params, state="running", trial_config=trial))
        rows.append(
            {
                "number": proposed[-1].number,
                "trial_id": trial.trial_id,
                "params": candidate.params,
                "steps": candidate.plan.estimated_steps,
                "gpu_hours": candidate.gpu_hours,
                "price": cost.price if cost else None,
                "vram_gb": candidate.plan.memory_estimate.vram_gb,
                "within_budget": hours <= spec.budget_gpu_hours if known else None,
            }
        )
    total = f"{hours:.3g} GPU-hours" if known else "unknown time: nothing was measured, set tokens_per_second"
    return StepResult(
        data={
            "experiment": spec.model_dump(mode="json"),
            "search_space": {name: span.model_dump() for name, span in space.items()},
            "proposed": rows,
            "trial_history": [],
            "best_trial": None,
        },
        artifacts=[],
        output_text=f"dry run: {len(rows)} trials proposed, {total}; the budget is {spec.budget_gpu_hours:g}",
        metadata={
            "status": "dry_run",
            "total_trials": 0,
            "best_trial_id": None,
            "gpu_hours_used": 0.0,
            "merged_path": None,
            "estimated_gpu_hours": hours if known else None,
            "estimated_price": price if known and bench.price_per_gpu_hour is not None else None,
        },
    )
