"""Outages, connections half dead, hostile answers, other editions."""

import socket
import threading
import time
from collections.abc import Callable

import pytest

from finetune.errors import ConfigurationError, RemoteError, TrainingError
from finetune.progress import ProgressEvent
from finetune.publishing import is_complete
from finetune.training.models import TrainingRequest
from resources.h2o import client, polling
from resources.h2o.client import backoff
from resources.h2o.protocol import Protocol, Timing
from resources.h2o_trainer import H2OTrainer
from tests.resources.h2o_server import (
    KEY,
    H2OServer,
    Handler,
    half_closes,
    says,
)
from tests.resources.h2o_training import FAST, train, trainer_for


class FastClock:
    """Time that passes in sleep alone, a thousand times as fast."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now + time.monotonic()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(seconds / 1000)
        self.on_sleep()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FastClock:
    clock = FastClock()
    monkeypatch.setattr(client, "time", clock)
    monkeypatch.setattr(polling, "time", clock)
    return clock


@pytest.mark.parametrize("call", ["upload", "create", "poll", "download"])
def test_an_outage_of_half_an_hour_is_survived_with_the_usual_patience(
    server: H2OServer, request_: TrainingRequest, clock: FastClock, call: str
) -> None:
    went_down = threading.Event()

    def goes_down(handler: Handler) -> bool:
        handler.drain()
        # Not in the listener's own thread, which it waits for.
        server.close()
        went_down.set()
        handler.close_connection = True
        return True

    server.faults[call] = [goes_down]
    down_at: list[float] = []
    events: list[ProgressEvent] = []

    def come_back() -> None:
        if went_down.is_set():
            down_at.append(clock.now)
            if clock.now - down_at[0] > 1800:
                went_down.clear()
                server.open()

    clock.on_sleep = come_back
    trainer = H2OTrainer(api_url=server.url, api_key=KEY)
    assert train(trainer, request_, events).status == "completed"
    assert server.struck == [call]
    assert down_at[-1] - down_at[0] > 1800
    refused = [event.stage for event in events if "ConnectError" in event.stage]
    assert 30 <= len(refused) <= 70, "waits grow to a minute and no further"
    assert (len(server.experiments), len(server.datasets)) == (1, 1)


def test_waits_double_with_jitter_up_to_their_ceiling() -> None:
    for trial in range(100):
        waits = {backoff(1, 60, trial) for _ in range(50)}
        longest = min(60, 2.0**trial)
        assert longest / 2 <= min(waits) < max(waits) <= longest


def test_a_server_that_accepts_no_connection_is_given_up_after_the_time_for_that(request_: TrainingRequest) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        # The kernel drops what comes to a full queue, as a firewall would.
        waiting = []
        for _ in range(4):
            other = socket.socket()
            other.setblocking(False)
            other.connect_ex(address)
            waiting.append(other)
        try:
            trainer = H2OTrainer(
                api_url=f"http://127.0.0.1:{address[1]}",
                timing=Timing(**{**FAST, "connect_timeout": 0.2, "retry_budget": 0.3}),
            )
            with pytest.raises(RemoteError, match="ConnectTimeout"):
                train(trainer, request_)
        finally:
            for other in waiting:
                other.close()


@pytest.mark.parametrize("call", ["upload", "list", "create", "poll", "download"])
def test_a_half_closed_connection_is_survived(server: H2OServer, request_: TrainingRequest, call: str) -> None:
    server.faults[call] = [half_closes]
    assert train(trainer_for(server), request_).status == "completed"
    assert server.struck == [call]
    assert len(server.experiments) == 1


HOSTILE_ANSWERS = {
    "nested": b"[" * 100_000,
    "scalar": b"7",
    "list": b"[[1], 2, null]",
    "no-status": b'{"id": "exp/1"}',
    "status-of-another-type": b'{"id": "exp/1", "status": {"$gt": ""}}',
    "step-of-another-type": b'{"id": "exp/1", "status": "running", "step": "many"}',
    "infinite-step": b'{"id": "exp/1", "status": "running", "step": 1e999}',
    "endless-number": b'{"id": "exp/1", "status": "running", "step": ' + b"9" * 10_000 + b"}",
    "endless-figure": b'{"id": "exp/1", "status": "running", "metrics": {"loss": ' + b"9" * 400 + b"}}",
    "id-that-leads-elsewhere": b'{"id": "..", "status": "running"}',
    "nul-in-id": b'{"id": "exp\\u0000", "status": "running"}',
    "surrogate-in-id": b'{"id": "exp\\ud800", "status": "running"}',
    "long-id": b'{"id": "' + b"x" * 10_000 + b'", "status": "running"}',
    "not-utf-8": b'{"id": "\xff", "status": "running"}',
    "too-long": b" " * (5 << 20) + b"{}",
}


@pytest.mark.parametrize("name", HOSTILE_ANSWERS)
@pytest.mark.parametrize("call", ["create", "poll"])
def test_a_hostile_answer_is_asked_for_again_and_ends_in_one_clear_error(
    server: H2OServer, request_: TrainingRequest, call: str, name: str
) -> None:
    server.faults[call] = [says(201, HOSTILE_ANSWERS[name])] * 5
    with pytest.raises(RemoteError, match=r"could not be worked with in 5 trials.*H2O_API_URL"):
        train(trainer_for(server), request_)
    assert server.struck == [call] * 5
    assert train(trainer_for(server), request_).status == "completed"


@pytest.mark.parametrize("identifier", [b"null", b'""', b'"\\ud800"', b'"' + b"x" * 300 + b'"'])
def test_an_id_of_a_dataset_that_cannot_be_kept_ends_in_one_clear_error(
    server: H2OServer, request_: TrainingRequest, identifier: bytes
) -> None:
    server.faults["upload"] = [says(201, b'{"id": ' + identifier + b"}")] * 5
    with pytest.raises(RemoteError, match="no usable field 'id'"):
        train(trainer_for(server), request_)
    assert server.struck == ["upload"] * 5


@pytest.mark.parametrize("call", ["upload", "list", "create", "poll"])
def test_an_answer_whose_compression_is_broken_is_asked_for_again(
    server: H2OServer, request_: TrainingRequest, call: str
) -> None:
    server.faults[call] = [says(200, b"no gzip", Content_Encoding="gzip")] * 5
    with pytest.raises(RemoteError, match="5 trials: DecodingError"):
        train(trainer_for(server), request_)
    assert server.struck == [call] * 5


def test_a_retry_after_in_other_digits_is_passed_over(server: H2OServer, request_: TrainingRequest) -> None:
    server.faults["poll"] = [says(503, Retry_After="\u00b2")]
    assert train(trainer_for(server), request_).status == "completed"
    assert server.struck == ["poll"]


def test_a_key_in_the_target_of_a_redirect_is_not_repeated(server: H2OServer, request_: TrainingRequest) -> None:
    server.faults["poll"] = [says(307, b"", Location=f"/{KEY}")]
    with pytest.raises(ConfigurationError, match=r"redirects to /\*\*\*,"):
        train(trainer_for(server), request_)


def test_halves_of_characters_in_a_servers_words_do_no_harm(server: H2OServer, request_: TrainingRequest) -> None:
    server.outcome = {"status": "failed", "error": "bad \ud800"}
    with pytest.raises(TrainingError, match=r"bad \\ud800") as caught:
        train(trainer_for(server), request_)
    assert str(caught.value).encode()


def test_figures_that_are_no_numbers_do_no_harm(server: H2OServer, request_: TrainingRequest) -> None:
    server.outcome = {"status": "finished", "metrics": {"loss": float("nan"), "gpu_hours": "many", "x": [1], "y": True}}
    result = train(trainer_for(server), request_)
    assert result.status == "completed"
    assert is_complete(request_.adapter_dir)


NO_LINKS = ["javascript:alert(1)", "data:text/html,x", "http://h/\u0000", 7, "https://h/" + "x" * 3000]


@pytest.mark.parametrize("url", NO_LINKS, ids=["script", "data", "nul", "number", "long"])
def test_an_address_that_is_no_link_does_not_become_one(
    server: H2OServer, request_: TrainingRequest, url: object
) -> None:
    external: list[tuple[str, str]] = []
    server.extra = {"url": url}
    result = train(trainer_for(server), request_, external=external)
    assert external == [("exp/1", f"{server.url}/api/experiments/exp%2F1")]
    assert result.external_run_url == external[0][1]


def test_the_servers_own_link_is_what_a_person_gets(server: H2OServer, request_: TrainingRequest) -> None:
    external: list[tuple[str, str]] = []
    server.extra = {"url": "https://h2o.internal/#/experiments/1"}
    train(trainer_for(server), request_, external=external)
    assert external == [("exp/1", "https://h2o.internal/#/experiments/1")]


def test_a_key_in_an_experiments_own_words_is_not_repeated(server: H2OServer, request_: TrainingRequest) -> None:
    server.outcome = {"status": "failed", "error": f"bad {KEY}", "log_tail": [f"curl -H 'Bearer {KEY}'"]}
    with pytest.raises(TrainingError, match=r"(?s)bad \*\*\*.*Bearer \*\*\*"):
        train(trainer_for(server), request_)


def test_an_experiment_that_vanishes_leaves_its_last_words(server: H2OServer, request_: TrainingRequest) -> None:
    server.extra = {"log_tail": "epoch 1 of 9"}

    def vanish(handler: Handler) -> bool:
        server.experiments.clear()
        return False

    server.faults["poll"] = [lambda handler: False, vanish]
    with pytest.raises(TrainingError, match=r"(?s)no such experiment.*epoch 1 of 9.*vanished"):
        train(trainer_for(server), request_)
    assert server.struck == ["poll", "poll"]


def test_every_name_of_another_edition_is_a_setting(server: H2OServer, request_: TrainingRequest) -> None:
    server.base = "v2"
    server.names = {
        "id": "uid",
        "status": "state",
        "queued": "WAITING",
        "running": "BUSY",
        "finished": "DONE",
        "stopped": "ABORTED",
        "step": "progress",
        "total_steps": "length",
        "metrics": "figures",
        "loss": "train_loss",
        "gpu_hours": "hours",
        "sha256": "digest",
        "idempotency_key": "client_token",
        "experiments": "items",
        "error": "reason",
        "log_tail": "log",
        "url": "link",
    }
    server.extra = {"url": "https://h2o.internal/1"}
    names = server.names
    protocol = Protocol(
        datasets_route="/v2/datasets",
        experiments_route="/v2/experiments",
        experiment_route="/v2/experiments/{id}",
        download_route="/v2/experiments/{id}/download",
        cancel_route="/v2/experiments/{id}/cancel",
        queued_statuses=["waiting"],
        running_statuses=["busy"],
        finished_statuses=["done"],
        failed_statuses=["broken"],
        stopped_statuses=["aborted"],
        id_field=names["id"],
        status_field=names["status"],
        step_field=names["step"],
        total_steps_field=names["total_steps"],
        metrics_field=names["metrics"],
        loss_metric=names["loss"],
        gpu_hours_metric=names["gpu_hours"],
        sha256_field=names["sha256"],
        key_field=names["idempotency_key"],
        list_field=names["experiments"],
        error_field=names["error"],
        log_field=names["log_tail"],
        url_field=names["url"],
    )
    assert not {name for name, value in protocol if value == getattr(Protocol(), name)}, "each differs from its default"
    trainer = H2OTrainer(api_url=server.url, api_key=KEY, timing=Timing(**FAST), protocol=protocol)
    server.hold.clear()
    with pytest.raises(RemoteError, match="took longer"):
        train(trainer.model_copy(update={"timing": Timing(**{**FAST, "total": 0.1})}), request_)
    assert trainer.cancel(request_.run_id, request_.work_dir)
    assert server.experiments["exp/1"]["status"] == "stopped"
    server.outcome = {"status": "failed", "error": "no memory", "log_tail": "CUDA"}
    names["failed"] = "BROKEN"
    server.hold.set()
    with pytest.raises(TrainingError, match=r"(?s)failed.*no memory.*CUDA"):
        train(trainer, request_)
    server.outcome = {"status": "finished"}
    external: list[tuple[str, str]] = []
    events: list[ProgressEvent] = []
    result = train(trainer, request_, events, external)
    assert external == [("exp/3", "https://h2o.internal/1")]
    assert (result.final_loss, result.gpu_hours, result.training_steps) == (0.5, 0.5, 4)
    assert [event.total for event in events if event.stage == "remote training"] == [4] * 4
    assert server.calls.count("unknown") == 0
