"""One experiment: its trials, what they have cost, and which worker has which.

A study of Optuna's is the ledger as well: what a trial has taken and what is reserved for it stand in its user
attributes, and are changed only under an advisory lock of the study's. A worker holds a lease for as long as it works
on a trial (`resources.lease`: renewed by a thread, over by the database's clock, with a fencing token), so that a trial
without one belongs to a worker that is dead, and is taken over by the next that asks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import ConfigurationError, RemoteError, TransientError
from finetune.planning.models import Range
from finetune.search.candidates import Candidate
from finetune.search.ledger import budget_of, reason_to_stop
from finetune.search.models import StopReason, TrialRecord, TrialState
from finetune.search.space import distribution
from finetune.search.spec import ExperimentSpec
from finetune.search.watch import TrialStopped
from resources.lease import Lease

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from resources.study import StudyStore

# A trial that kills its worker each time is given up.
MOST_ATTEMPTS = 3
# The trials' user attribute that holds what Optuna has no place for.
_RECORD = "record"
# The study's user attribute that tells when the next trial did not fit what was left of the budget.
_SHORT = "short_of_budget"
_KEPT = {"gpu_hours", "reserved_gpu_hours", "attempts", "trial_config", "run_id", "adapter_path", "metrics", "reason"}
# What ends running trials too.
_AT_ONCE: frozenset[StopReason] = frozenset({"threshold", "patience", "budget"})

# The next trial, or None when nothing more may start.
Propose = Callable[[Sequence[TrialRecord], float], Candidate | None]


@dataclass(frozen=True)
class Turn:
    """A trial in the hands of this worker."""

    trial: TrialRecord
    lease: Lease


class Experiment:
    """One experiment's trials, for any number of workers in any number of processes."""

    def __init__(
        self, store: "StudyStore", study: "Study", spec: ExperimentSpec, space: dict[str, Range], lease_seconds: float
    ) -> None:
        self.store, self.spec, self.space = store, spec, space
        self._study = study
        self._lease_seconds = lease_seconds

    @property
    def name(self) -> str:
        """As `ExperimentSpec.identity` gave it."""
        return str(self._study.study_name)

    def history(self) -> list[TrialRecord]:
        """All trials, by number."""
        with storage_fault_named():
            return [_record_of(trial) for trial in self._study.get_trials(deepcopy=False)]

    def ended(self) -> StopReason | None:
        """What ended the experiment under the limits that it has now, for good: running trials stop, too."""
        with storage_fault_named():
            ended = self._study.user_attrs.get("ended")
        return ended["reason"] if ended and ended["limits"] == self.spec.limits.model_dump() else None

    def over(self) -> StopReason | None:
        """Why no more trials may start, or None while one may."""
        history = self.history()
        with storage_fault_named():
            short = self._study.user_attrs.get(_SHORT) == self._standing(history)
        return self.ended() or reason_to_stop(history, self.spec.limits) or ("budget" if short else None)

    def _standing(self, history: Sequence[TrialRecord]) -> dict[str, Any]:
        """The limits and how many trials there are: what is the same until something has changed."""
        return {"limits": self.spec.limits.model_dump(), "trials": len(history)}

    @contextmanager
    def next_trial(self, propose: Propose) -> Iterator[Turn | StopReason | Literal["wait"]]:
        """A trial to work on for the block: one whose worker is dead, else a new one.

        Yields:
            The trial; why the experiment is over; or ``wait`` while what other workers do decides.

        Raises:
            RemoteError: the database cannot be reached.
        """
        with ExitStack() as held:
            with self.store.exclusively(self.name):
                turn = self._next(propose, held)
            yield turn

    def _next(self, propose: Propose, held: ExitStack) -> Turn | StopReason | Literal["wait"]:
        history = self.history()
        over = self.ended() or reason_to_stop(history, self.spec.limits)
        for trial in history:
            if trial.state == "running" and not self.store.is_held(self._lease_of(trial.number)):
                if over is None or over == "max_trials":
                    again = self._take_over(trial, held)
                    if again is not None:
                        return again
                    # A trial that was given up leaves room for another.
                    over = None
                else:
                    self._end(trial, "pruned", reason=over)
        history = self.history()
        over = over or reason_to_stop(history, self.spec.limits)
        running = any(trial.state == "running" for trial in history)
        if over is not None:
            return "wait" if running and over not in _AT_ONCE else over
        remaining = budget_of(history, self.spec.budget_gpu_hours).remaining
        try:
            candidate = propose(history, remaining)
        except ConfigurationError as error:
            # What fits neither the memory nor itself is no trial, but must not be tried for ever.
            self._add({}, gpu_hours=0.0, failed=str(error))
            return self._next(propose, held)
        # What nobody can estimate may take all that is left, so that the first trial runs alone.
        hours = remaining if candidate is None or candidate.gpu_hours is None else candidate.gpu_hours
        if candidate is None or hours > remaining:
            if running:
                return "wait"
            # Not for good: a later estimate may be a lower one.
            with storage_fault_named():
                self._study.set_user_attr(_SHORT, self._standing(history))
            return "budget"
        trial = self._add(candidate.params, gpu_hours=hours, candidate=candidate)
        return self._hold(trial, held)

    def _take_over(self, trial: TrialRecord, held: ExitStack) -> Turn | None:
        """Work on a dead worker's trial, or give it up."""
        if trial.attempts >= MOST_ATTEMPTS:
            self._end(trial, "failed", reason=f"its worker was killed {trial.attempts} times")
            return None
        turn = self._hold(trial.model_copy(update={"attempts": trial.attempts + 1}), held)
        self._keep(turn.trial)
        return turn

    def _hold(self, trial: TrialRecord, held: ExitStack) -> Turn:
        lease = self.store.lease(self._lease_of(trial.number), seconds=self._lease_seconds)
        return Turn(trial, held.enter_context(lease))

    def _lease_of(self, number: int) -> str:
        return f"experiment {self.name} trial {number}"

    def _add(
        self, params: dict[str, Any], *, gpu_hours: float, candidate: Candidate | None = None, failed: str = ""
    ) -> TrialRecord:
        from optuna.trial import TrialState as State
        from optuna.trial import create_trial

        record = TrialRecord(
            number=0,
            params=params,
            state="failed" if failed else "running",
            reserved_gpu_hours=gpu_hours,
            trial_config=candidate.plan.trial_config if candidate else None,
            reason=failed,
        )
        with storage_fault_named():
            self._study.add_trial(
                create_trial(
                    state=State.FAIL if failed else State.RUNNING,
                    params=params,
                    distributions={name: distribution(self.space[name]) for name in params},
                    user_attrs={_RECORD: _kept(record)},
                )
            )
        return self.history()[-1]

    def report(self, turn: Turn, rung: int, loss: float) -> bool:
        """Note the held-out loss at a rung; tells whether the trial should stop."""
        from optuna.trial import Trial

        with storage_fault_named():
            trial = Trial(self._study, self._id_of(turn.trial.number))
            trial.report(loss, rung)
            return trial.should_prune()

    def spend(self, turn: Turn, used: float) -> float:
        """Note what a trial has taken, and ask how much it may take; a little more where the budget has it.

        Raises:
            TrialStopped: the budget is spent, or the experiment is over.
            TransientError: another worker has taken the trial over.
        """
        with self.store.exclusively(self.name):
            self._refuse_lost(turn)
            if ended := self.ended():
                raise TrialStopped(ended)
            history = self.history()
            trial = history[turn.trial.number].model_copy(update={"gpu_hours": used})
            history[trial.number] = trial
            allowed = trial.reserved_gpu_hours
            if used >= allowed:
                free = budget_of(history, self.spec.budget_gpu_hours).remaining
                if free <= 0:
                    self._keep(trial)
                    raise TrialStopped("budget")
                allowed = used + min(free, used / 4)
            self._keep(trial.model_copy(update={"reserved_gpu_hours": allowed}))
        return allowed

    def end(self, turn: Turn, state: TrialState, **found: Any) -> None:
        """Settle a trial: what it took, its value and metrics, or why it ended early.

        Raises:
            TransientError: another worker has taken the trial over.
        """
        with self.store.exclusively(self.name):
            self._refuse_lost(turn)
            self._end(self.history()[turn.trial.number], state, **found)
            reason = reason_to_stop(self.history(), self.spec.limits)
            if reason in _AT_ONCE and self.ended() is None:
                with storage_fault_named():
                    ended = {"reason": reason, "limits": self.spec.limits.model_dump()}
                    self._study.set_user_attr("ended", ended)

    def _end(self, trial: TrialRecord, state: TrialState, *, value: float | None = None, **found: Any) -> None:
        from optuna.trial import TrialState as State

        states = {"completed": State.COMPLETE, "pruned": State.PRUNED, "failed": State.FAIL}
        self._keep(trial.model_copy(update=found))
        with storage_fault_named():
            self._study.tell(trial.number, value, states[state])

    def _keep(self, trial: TrialRecord) -> None:
        with storage_fault_named():
            self._study._storage.set_trial_user_attr(self._id_of(trial.number), _RECORD, _kept(trial))

    def _id_of(self, number: int) -> int:
        storage = self._study._storage
        return storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)

    def _refuse_lost(self, turn: Turn) -> None:
        if not turn.lease.still_mine():
            raise TransientError(
                "another worker has taken this trial over, so this one stops",
                where=f"experiment {self.name}, trial {turn.trial.number}",
                remedy="Nothing needs doing: the other one goes on from the last checkpoint",
            )


def _kept(trial: TrialRecord) -> dict[str, Any]:
    return trial.model_dump(mode="json", include=_KEPT)


def _record_of(trial: "FrozenTrial") -> TrialRecord:
    from optuna.trial import TrialState as State

    states: dict[State, TrialState] = {
        State.COMPLETE: "completed",
        State.PRUNED: "pruned",
        State.FAIL: "failed",
    }
    return TrialRecord.model_validate(
        {
            **trial.user_attrs.get(_RECORD, {}),
            "number": trial.number,
            "params": trial.params,
            "state": states.get(trial.state, "running"),
            "value": trial.value if trial.state == State.COMPLETE else None,
            "intermediate": trial.intermediate_values,
            "started_at": trial.datetime_start and trial.datetime_start.astimezone(UTC),
            "finished_at": trial.datetime_complete and trial.datetime_complete.astimezone(UTC),
        }
    )


@contextmanager
def storage_fault_named() -> Iterator[None]:
    """Optuna's word that the database did not answer, as one of our errors."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        raise RemoteError(
            f"the experiments' database does not answer: {' '.join(str(error.__cause__ or error).split())[:200]}",
            where="DATABASE_URL",
            remedy="Check that the server runs; run again, and the experiment goes on",
        ) from error
