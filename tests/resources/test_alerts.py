"""Alerts over real HTTP on loopback: what they say, how often, and that nothing comes of a webhook that fails."""

import errno
import fcntl
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.redaction import Redactor
from resources.alerts import Alert, Alerts
from tests.resources.webhook_server import WebhookServer

TROUBLE = Alert(
    title="train_and_export failed",
    reason="the embedded PostgreSQL <is> away & gone",
    remedy="Start it",
    run_id="d-1",
    date="2026-06-01",
    step="brain__adapter",
)
Make = Callable[..., Alerts]


@pytest.fixture
def webhook() -> Iterator[WebhookServer]:
    server = WebhookServer()
    yield server
    server.close()


@pytest.fixture
def make(webhook: WebhookServer, tmp_path: Path) -> Make:
    def alerts(secrets: list[str] | None = None, **changes: object) -> Alerts:
        arguments = {"state": tmp_path / "alerts" / "brain.json", "interval": 3600, "limit": 20, "ui_url": None}
        return Alerts(webhook.url, redact=Redactor([webhook.url, *(secrets or [])]), **arguments | changes)

    return alerts


def test_an_alert_names_run_date_step_reason_remedy_and_a_link(make: Make, webhook: WebhookServer) -> None:
    assert make(ui_url="https://dagster.internal/").send(TROUBLE)
    assert webhook.bodies == [
        {
            "text": "*train_and_export failed*\n"
            "Date: 2026-06-01\n"
            "Step: brain__adapter\n"
            "Run: https://dagster.internal/runs/d-1\n"
            "Reason: the embedded PostgreSQL &lt;is&gt; away &amp; gone\n"
            "What to do: Start it"
        }
    ]
    assert make().send(Alert(title="Another", reason="r", remedy="m", run_id="d-2"))
    assert "Run: d-2" in webhook.texts[1]


def test_no_secret_leaves_the_machine(make: Make, webhook: WebhookServer) -> None:
    secrets = ["postgresql://me:db-pass-1@host/db", "h2o-key-2", "hf_hub_token_3"]
    reason = f"db-pass-1 at postgresql://me:db-pass-1@host/db; h2o-key-2; hf_hub_token_3; {webhook.url}"
    assert make(secrets).send(Alert(title=f"failed: {reason}", reason=reason, remedy=reason, run_id="r", step=reason))
    for secret in ("db-pass-1", "h2o-key-2", "hf_hub_token_3", "hush-hush"):
        assert secret in reason
        assert secret not in webhook.texts[0]


def test_the_same_trouble_is_told_once_in_an_interval_by_whatever_process(
    make: Make, webhook: WebhookServer, tmp_path: Path
) -> None:
    assert [make().send(TROUBLE) for _ in range(3)] == [True, False, False]
    other_date = Alert(**{**TROUBLE.__dict__, "date": "2026-06-02"})
    assert make().send(other_date), "another date is another trouble"
    assert len(webhook.texts) == 2
    state = tmp_path / "alerts" / "brain.json"
    sent = json.loads(state.read_text())
    sent["at"] = {key: at - 3601 for key, at in sent["at"].items()}
    state.write_text(json.dumps(sent))
    assert make().send(TROUBLE)
    assert webhook.texts[2].endswith("(2 more like this were held back since the last one)")


def test_of_many_different_troubles_no_more_than_the_limit_are_told(make: Make, webhook: WebhookServer) -> None:
    sent = [make(limit=3).send(Alert(title=f"trouble {n}", reason="r", remedy="m")) for n in range(60)]
    assert sum(sent) == len(webhook.texts) == 3


def test_what_is_remembered_stays_small(make: Make, tmp_path: Path) -> None:
    for n in range(60):
        make(limit=2).send(Alert(title=f"trouble {n}", reason="r", remedy="m"))
    remembered = json.loads((tmp_path / "alerts" / "brain.json").read_text())
    assert len(remembered["at"]) == 2
    assert len(remembered["held_back"]) <= 21


@pytest.mark.parametrize("content", ["", "{", '{"at": 3}', "\x00"])
def test_a_damaged_memory_keeps_nobody_from_being_told(make: Make, tmp_path: Path, content: str) -> None:
    (tmp_path / "alerts").mkdir()
    (tmp_path / "alerts" / "brain.json").write_text(content)
    assert make().send(TROUBLE)
    assert not make().send(TROUBLE)


def test_where_nothing_can_be_written_people_are_told_all_the_same(make: Make, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("a file where a directory should be")
    assert make(state=tmp_path / "full" / "alerts.json").send(TROUBLE)


@pytest.mark.parametrize(
    ("answers", "arrived", "requests"),
    [([503, 200], True, 2), ([429, 500, 204], True, 3), ([500], False, 3), ([404], False, 1), ([302], False, 1)],
)
def test_passing_faults_of_the_webhook_are_tried_again_and_lasting_ones_are_not(
    make: Make,
    webhook: WebhookServer,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[int],
    arrived: bool,
    requests: int,
) -> None:
    monkeypatch.setattr("resources.alerts._FIRST_PAUSE_SECONDS", 0.01)
    webhook.answers, webhook.headers = answers, {"Location": "http://127.0.0.1:1/elsewhere"}
    assert make().send(TROUBLE) is arrived
    assert len(webhook.bodies) == requests
    webhook.answers = [200]
    assert make().send(TROUBLE) is not arrived, "what did not arrive is told the next time, and what did is not"


def test_a_webhook_that_is_gone_costs_seconds_and_its_address_is_not_logged(
    make: Make, webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("resources.alerts._FIRST_PAUSE_SECONDS", 0.01)
    webhook.close()
    with caplog.at_level(logging.DEBUG):
        assert not make().send(TROUBLE)
    [record] = [record for record in caplog.records if record.name == "resources.alerts"]
    assert "was not sent: ConnectError" in record.getMessage()
    assert "hush-hush" not in caplog.text


def test_a_long_wait_that_the_webhook_asks_for_is_cut_short(
    make: Make, webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("resources.alerts.time.sleep", waited.append)
    webhook.answers, webhook.headers = [429], {"Retry-After": "3600"}
    assert not make().send(TROUBLE)
    assert waited == [5, 5]


def test_without_a_webhook_nothing_is_sent_and_nothing_written(tmp_path: Path) -> None:
    alerts = Alerts(None, state=tmp_path / "alerts.json", interval=1, limit=1, redact=Redactor())
    assert not alerts.send(TROUBLE)
    assert list(tmp_path.iterdir()) == []


def test_where_a_volume_has_no_locks_people_are_told_all_the_same(
    make: Make, webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck: list[int] = []

    def without_locks(stream: object, operation: int) -> None:
        struck.append(operation)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    assert make().send(TROUBLE)
    assert struck
    assert len(webhook.texts) == 1
