"""How a run ended, read from its events: what was made, what failed and why, and whether that may pass."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import dagster as dg
from dagster_shared.error import SerializableErrorInfo
from pydantic import BaseModel, ConfigDict

from finetune.errors import PermanentError, TransientError


def _names(kind: type[Exception]) -> set[str]:
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))


_PASSING = _names(TransientError)
# A gate's refusal, and what no retry mends.
_GATE = "DagsterAssetCheckFailedError"
_LASTING = {_GATE, *_names(PermanentError)}


class StepOutcome(BaseModel):
    """How one asset of a run ended."""

    model_config = ConfigDict(frozen=True)

    asset: str
    seconds: float
    figures: dict[str, Any]


class DateOutcome(BaseModel):
    """How the run of one date ended."""

    model_config = ConfigDict(frozen=True)

    date: str
    status: Literal["SUCCESS", "FAILURE"]
    dagster_run_id: str
    seconds: float
    steps: list[StepOutcome]
    failed_checks: list[str]
    error: str | None
    # whether trying again later may help
    transient: bool = False


class FailedStep(BaseModel):
    """A step that failed for good, and why."""

    model_config = ConfigDict(frozen=True)

    step: str
    reason: str
    # whether trying again later may help
    transient: bool
    # whether trying again is of no use while nothing changes; of many errors nobody knows either
    lasting: bool
    # whether a blocking check stopped it, whose own description says more
    gate: bool


def failed_steps(events: Sequence[dg.DagsterEvent]) -> list[FailedStep]:
    """The steps of a run that failed after all their retries."""
    return [
        FailedStep(
            step=event.step_key or "",
            reason=_cause(event.step_failure_data.error) if event.step_failure_data.error else "unknown",
            transient=bool(_PASSING & set(_classes(event.step_failure_data.error))),
            lasting=bool(_LASTING & set(_classes(event.step_failure_data.error))),
            gate=_GATE in _classes(event.step_failure_data.error),
        )
        for event in events
        if event.is_step_failure
    ]


def failed_checks(events: Sequence[dg.DagsterEvent]) -> list[dg.AssetCheckEvaluation]:
    """The asset checks of a run that were not passed, warnings included."""
    checks = (
        event.asset_check_evaluation_data
        for event in events
        if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    )
    return [check for check in checks if not check.passed]


def _classes(error: SerializableErrorInfo | None) -> Iterator[str]:
    while error is not None:
        yield str(error.cls_name)
        error = error.cause or error.context


def _cause(error: SerializableErrorInfo) -> str:
    """What the step raised, without Dagster's wrapping and the name of its class."""
    while str(error.cls_name).startswith(("Dagster", "RetryRequested")) and (error.cause or error.context):
        error = error.cause or error.context or error
    return error.message.strip().splitlines()[0].split(": ", 1)[-1]


def date_outcome(
    date: str, success: bool, run_id: str, events: Sequence[dg.DagsterEvent], seconds: float
) -> DateOutcome:
    """How a date's run ended, by its events."""
    durations = {
        event.step_key: event.step_success_data.duration_ms / 1000 for event in events if event.is_step_success
    }
    steps = [
        StepOutcome(
            asset=materialization.asset_key.path[-1],
            seconds=durations.get(event.step_key, 0.0),
            figures={name: value.value for name, value in materialization.metadata.items()},
        )
        for event in events
        if event.is_step_materialization
        for materialization in [event.step_materialization_data.materialization]
    ]
    checks, broken = failed_checks(events), failed_steps(events)
    errors = [f"{step.step}: {step.reason}" for step in broken if not step.gate]
    errors += [
        f"{check.check_name}: {check.description}" for check in checks if check.severity == dg.AssetCheckSeverity.ERROR
    ]
    return DateOutcome(
        date=date,
        status="SUCCESS" if success else "FAILURE",
        dagster_run_id=run_id,
        seconds=seconds,
        steps=steps,
        failed_checks=[f"{check.check_name}: {check.description}" for check in checks],
        transient=bool(broken) and all(step.transient for step in broken),
        error=None if success else "; ".join(errors or ["see the Dagster UI"]),
    )
