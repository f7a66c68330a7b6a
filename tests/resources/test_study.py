"""Experiments in a real PostgreSQL, with real workers."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.errors import ConfigurationError, TransientError
from finetune.progress import ProgressEvent, ignore_progress
from finetune.search.ledger import budget_of
from finetune.search.models import TrialRecord
from finetune.search.spec import ExperimentSpec
from finetune.search.watch import Watch
from resources.experiment import Experiment, Turn
from resources.search_worker import Outcome, work
from resources.study import StudyStore
from tests.resources.search_worker_process import SPACE, STEPS, loop, proposer

STARTED: list[subprocess.Popen[str]] = []
# Before a trial's lease is taken, while it trains, before its result is told, and after.
MOMENTS = ("added", "training", "trained", "told")


@pytest.fixture
def store(database: str) -> Iterator[StudyStore]:
    store = StudyStore(database_url=database, data_dir="/nowhere")
    yield store
    store.close()


def spec_with(**fields: object) -> ExperimentSpec:
    return ExperimentSpec.model_validate({"strategy": "random", "stop_patience": None, **fields})


def start(
    database: str, directory: Path, spec: ExperimentSpec, moment: str = "", seconds: float = 0.0
) -> subprocess.Popen[str]:
    arguments = [database, str(directory), spec.model_dump_json(), moment, str(seconds)]
    STARTED.append(
        subprocess.Popen(
            [sys.executable, "-m", "tests.resources.search_worker_process", *arguments],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    return STARTED[-1]


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """A test that fails leaves no worker behind, paused ones neither."""
    yield
    while STARTED:
        worker = STARTED.pop()
        worker.kill()
        worker.wait()
        if worker.stdout is not None:
            worker.stdout.close()


def steps(directory: Path, number: int) -> list[list[int]]:
    return [[int(part) for part in line.split()] for line in (directory / f"steps-{number}").read_text().splitlines()]


def quick(trial: TrialRecord, watch: Watch) -> Outcome:
    value = float(trial.params["learning_rate"])
    return Outcome(value=value, metrics={"eval_loss": value}, run_id=f"r{trial.number}", adapter_path="a")


def test_an_experiment_whose_workers_are_killed_goes_on_and_repeats_nothing(
    database: str, store: StudyStore, tmp_path: Path
) -> None:
    spec = spec_with(max_trials=6)
    for moment in MOMENTS:
        killed = start(database, tmp_path, spec, moment)
        killed.communicate(timeout=300)
        assert killed.returncode == -signal.SIGKILL
        assert (tmp_path / f"struck-{moment}").exists()
    last = start(database, tmp_path, spec)
    told, _ = last.communicate(timeout=300)
    assert "over max_trials" in told
    history = store.find_experiment("e1").history()
    assert [trial.state for trial in history] == ["completed"] * 6
    assert [[step for _, step in steps(tmp_path, number)] for number in range(6)] == [list(range(1, STEPS + 1))] * 6
    # Whoever was killed after a trial had been settled left none to be taken over.
    assert sum(trial.attempts for trial in history) == 6 + len(MOMENTS) - 1


def test_a_killed_worker_s_trial_is_taken_over_by_one_that_runs_and_a_paused_one_finds_itself_replaced(
    database: str, store: StudyStore, tmp_path: Path
) -> None:
    spec = spec_with(max_trials=2, workers=2)
    paused = start(database, tmp_path, spec, "paused")
    os.waitid(os.P_PID, paused.pid, os.WSTOPPED | os.WNOWAIT)
    other = start(database, tmp_path, spec)
    told, _ = other.communicate(timeout=300)
    assert "over max_trials" in told
    history = store.find_experiment("e1").history()
    assert [(trial.state, trial.attempts) for trial in history] == [("completed", 2), ("completed", 1)]
    assert {pid for pid, _ in steps(tmp_path, 0)} == {paused.pid, other.pid}
    os.kill(paused.pid, signal.SIGCONT)
    paused.communicate(timeout=300)
    assert paused.returncode == 1, "it may not go on"
    assert store.find_experiment("e1").history() == history


def test_a_trial_that_kills_its_worker_each_time_is_given_up(store: StudyStore) -> None:
    spec = spec_with(max_trials=1, max_loop_iterations=10)
    experiment = store.open_experiment("e1", spec, SPACE)
    for attempt in (1, 2, 3):
        with experiment.next_trial(proposer(spec, gpu_hours=0.1)) as turn:
            assert isinstance(turn, Turn)
            assert (turn.trial.number, turn.trial.attempts) == (0, attempt)
    assert work(experiment, proposer(spec, gpu_hours=0.1), quick, on_progress=ignore_progress) == "max_trials"
    failed, completed = experiment.history()
    assert (failed.state, failed.reason) == ("failed", "its worker was killed 3 times")
    assert completed.state == "completed"


def test_options_of_the_databases_address_hold_for_the_trials_too(database: str) -> None:
    import sqlalchemy as sa

    store = StudyStore(database_url=f"{database}&options=-cwork_mem%3D7MB", data_dir="/nowhere")
    try:
        with sa.create_engine(store._optuna().url, poolclass=sa.NullPool).connect() as connection:  # type: ignore[attr-defined]  # of the storage in use
            shown = [connection.scalar(sa.text(f"SHOW {name}")) for name in ("work_mem", "search_path")]
    finally:
        store.close()
    assert shown == ["7MB", "optuna"]


def test_a_trial_that_the_budget_does_not_hold_ends_the_experiment_and_is_told_until_there_is_more(
    database: str, store: StudyStore
) -> None:
    spec = spec_with(max_trials=3, budget_gpu_hours=0.5)
    experiment = store.open_experiment("short", spec, SPACE)
    assert experiment.over() is None
    assert work(experiment, proposer(spec, gpu_hours=1.0), quick, on_progress=ignore_progress) == "budget"
    assert experiment.history() == []
    assert store.find_experiment("short").over() == "budget"
    raised = store.open_experiment("short", spec_with(max_trials=3, budget_gpu_hours=5.0), SPACE)
    assert raised.over() is None
    # Nor is it over for good: by another estimate a trial fits.
    assert work(experiment, proposer(spec, gpu_hours=0.01), quick, on_progress=ignore_progress) == "max_trials"


def test_two_workers_share_the_trials_and_the_budget(database: str, store: StudyStore, tmp_path: Path) -> None:
    # Each trial reserves 0.01 hours: of three that may run, the budget holds two at a time.
    spec = spec_with(max_trials=5, budget_gpu_hours=0.025, workers=3)
    workers = [start(database, tmp_path, spec, seconds=0.05) for _ in range(3)]
    experiment = None
    most = 0.0
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.05)
        if store.experiments():
            experiment = experiment or store.find_experiment("e1")
            history = experiment.history()
            budget = budget_of(history, 0.025)
            most = max(most, budget.used + budget.reserved)
            assert sum(trial.state == "running" for trial in history) <= 2
    assert experiment is not None
    assert 0.01 < most <= 0.025 + 1e-4
    history = experiment.history()
    assert [trial.state for trial in history] == ["completed"] * 5
    assert len({tuple(trial.params.values()) for trial in history}) == 5
    assert len({steps(tmp_path, number)[0][0] for number in range(5)}) > 1, "one did it all"
    for worker in workers:
        assert worker.communicate()[0].endswith("over max_trials\n")


def test_a_trial_that_takes_more_than_was_estimated_gets_what_is_left_and_no_more(
    store: StudyStore, tmp_path: Path
) -> None:
    # Nine steps of 0.1 s, estimated at 0.1 s together, in a budget of 0.5 s.
    spec = spec_with(max_trials=3, budget_gpu_hours=0.5 / 3600)
    experiment = store.open_experiment("e1", spec, SPACE)
    slow = loop(tmp_path, 0.1, lambda moment: None)
    reason = work(experiment, proposer(spec, gpu_hours=0.1 / 3600), slow, on_progress=ignore_progress, interval=10.0)
    (trial,) = experiment.history()
    assert (reason, trial.state, trial.reason) == ("budget", "pruned", "budget")
    assert len(steps(tmp_path, 0)) < STEPS
    # Never an interval too much; here it is one step, and what asking takes on a busy machine.
    assert 0.5 <= trial.gpu_hours * 3600 < 10.5


def test_an_estimate_that_nobody_can_make_reserves_all_that_is_left(store: StudyStore) -> None:
    spec = spec_with(max_trials=3, budget_gpu_hours=2.0)
    experiment = store.open_experiment("e1", spec, SPACE)
    with experiment.next_trial(proposer(spec, gpu_hours=None)) as first:
        assert isinstance(first, Turn)
        assert first.trial.reserved_gpu_hours == 2.0
        with experiment.next_trial(proposer(spec, gpu_hours=None)) as second:
            assert second == "wait"
        experiment.end(first, "completed", value=1.0, gpu_hours=0.5)
    with experiment.next_trial(proposer(spec, gpu_hours=0.5)) as third:
        assert isinstance(third, Turn)


def test_a_threshold_ends_the_experiment_and_the_trials_that_run(store: StudyStore, tmp_path: Path) -> None:
    spec = spec_with(max_trials=5, stop_threshold=1.0)
    experiment = store.open_experiment("e1", spec, SPACE)
    told = threading.Event()
    ended: list[str] = []

    def run() -> None:
        slow = loop(tmp_path, 0.05, lambda moment: None)

        def listen(event: ProgressEvent) -> None:
            if event.stage == "training":
                told.set()

        ended.append(work(experiment, proposer(spec, gpu_hours=0.1), slow, on_progress=listen, interval=0.0))

    with experiment.next_trial(proposer(spec, gpu_hours=0.1)) as turn:
        assert isinstance(turn, Turn)
        other = threading.Thread(target=run)
        other.start()
        assert told.wait(180)
        experiment.end(turn, "completed", value=0.9, gpu_hours=0.01)
    other.join(180)
    assert ended == ["threshold"]
    first, second = experiment.history()
    assert (first.state, second.state, second.reason) == ("completed", "pruned", "threshold")
    assert 0 < second.gpu_hours < 0.01
    # With other limits the same experiment goes on.
    more = store.open_experiment("e1", spec_with(max_trials=3), SPACE)
    assert work(more, proposer(more.spec, gpu_hours=0.1), quick, on_progress=ignore_progress) == "max_trials"
    assert len(more.history()) == 3


@pytest.mark.parametrize(
    ("limit", "values"),
    [({"stop_threshold": 1.0}, [0.9]), ({"stop_patience": 1}, [0.8, 0.9])],
    ids=["threshold", "patience"],
)
def test_threshold_and_patience_end_the_trial_of_another_process_when_it_looks_next(
    limit: dict[str, float], values: list[float], database: str, store: StudyStore, tmp_path: Path
) -> None:
    spec = spec_with(max_trials=9, workers=2, **limit)
    experiment = store.open_experiment("e1", spec, SPACE)
    propose = proposer(spec, gpu_hours=0.1)
    with experiment.next_trial(propose) as first:
        assert isinstance(first, Turn)
        # It looks at every step: a step is longer than its interval.
        other = start(database, tmp_path, spec, seconds=0.7)
        assert other.stdout is not None
        told = [""]
        while "training" not in told[-1]:
            told.append(other.stdout.readline())
            assert told[-1], told
        for value in values[:-1]:
            with experiment.next_trial(propose) as between:
                assert isinstance(between, Turn)
                experiment.end(between, "completed", value=value, gpu_hours=0.0)
        assert experiment.ended() is None
        experiment.end(first, "completed", value=values[-1], gpu_hours=0.0)
    done = len(steps(tmp_path, 1))
    assert other.communicate(timeout=300)[0].endswith(f"over {experiment.ended()}\n")
    assert str(experiment.ended()) in next(iter(limit))
    trial = experiment.history()[1]
    assert (trial.state, trial.reason) == ("pruned", experiment.ended())
    # The step in which it was told, and no other.
    assert done <= len(steps(tmp_path, 1)) <= done + 1 < STEPS


def test_halving_stops_trials_at_their_rungs_and_they_cost_what_they_used(store: StudyStore, tmp_path: Path) -> None:
    spec = spec_with(max_trials=9, strategy="halving", budget_gpu_hours=1.0)
    experiment = store.open_experiment("e1", spec, SPACE)
    run = loop(tmp_path, 0.0, lambda moment: None)
    assert work(experiment, proposer(spec, gpu_hours=0.01), run, on_progress=ignore_progress) == "max_trials"
    history = experiment.history()
    pruned = [trial for trial in history if trial.state == "pruned"]
    assert len(pruned) >= 4
    for trial in pruned:
        assert trial.reason == "pruned"
        assert len(steps(tmp_path, trial.number)) == STEPS * max(trial.intermediate) // 9
        assert 0 < trial.gpu_hours < 0.01
    best = min(history, key=lambda trial: float(trial.params["learning_rate"]))
    assert best.state == "completed"
    assert budget_of(history, 1.0).reserved == 0


def test_a_candidate_that_fits_nothing_is_a_failed_trial_and_ends_some_time(store: StudyStore) -> None:
    spec = spec_with(max_loop_iterations=4)
    experiment = store.open_experiment("e1", spec, SPACE)

    def refuse(history: object, remaining: float) -> None:
        raise ConfigurationError("nothing fits 1 GB")

    assert work(experiment, refuse, quick, on_progress=ignore_progress) == "max_loop_iterations"
    assert [(trial.state, trial.reason) for trial in experiment.history()] == [("failed", "nothing fits 1 GB")] * 4


def test_optuna_s_tables_lie_in_a_schema_of_their_own(store: StudyStore, database: str) -> None:
    import sqlalchemy as sa

    store.open_experiment("e1", spec_with(), SPACE)
    with sa.create_engine(database, poolclass=sa.NullPool).connect() as connection:
        tables = connection.execute(
            sa.text(
                "SELECT table_schema, table_name FROM information_schema.tables WHERE table_schema !~ '^(pg_|info)'"
            )
        ).all()
    assert ("optuna", "studies") in tables
    assert {name for schema, name in tables if schema == "public"} >= {"lora_training_runs"}
    assert not {name for schema, name in tables if schema == "public"} & {"studies", "trials", "alembic_version"}


def test_an_experiment_that_never_was_is_told_with_those_that_are(store: StudyStore) -> None:
    store.open_experiment("e1", spec_with(), SPACE)
    with pytest.raises(ConfigurationError, match=r"no experiment is named e2.*e1"):
        store.find_experiment("e2")


def test_a_worker_that_lost_its_trial_cannot_settle_it(store: StudyStore) -> None:
    spec = spec_with()
    experiment: Experiment = store.open_experiment("e1", spec, SPACE)
    with experiment.next_trial(proposer(spec, gpu_hours=0.1)) as turn:
        assert isinstance(turn, Turn)
    with experiment.next_trial(proposer(spec, gpu_hours=0.1)) as again:
        assert isinstance(again, Turn)
        assert again.trial.number == turn.trial.number
        with pytest.raises(TransientError, match="another worker has taken this trial over"):
            experiment.end(turn, "completed", value=0.0)
        experiment.end(again, "completed", value=1.0)
    assert experiment.history()[0].value == 1.0
