"""Alerts to a webhook: a chat message for a person who is not looking.

The body is ``{"text": ...}``, which Slack's incoming webhooks take, and Mattermost's, Rocket.Chat's and others
that are made alike. An alert is never worth a run: whatever goes wrong here is logged and forgotten.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from pydantic import BaseModel, ValidationError

from finetune.publishing import write_bytes_atomically
from finetune.redaction import Redactor

_logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_TIMEOUT_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 5.0
# Slack cuts longer texts itself (docs.slack.dev: text of chat.postMessage, recommended below 4,000 characters).
_LONGEST_REASON = 1500


@dataclass(frozen=True)
class Alert:
    """What happened, and what a person can do about it.

    Attributes:
        title: what happened, in one line.
        reason: why, as the error says it.
        remedy: what to do.
        run_id: the Dagster run, if there is one.
        date: the dataset date, if there is one.
        step: the asset or check, if there is one.
    """

    title: str
    reason: str
    remedy: str
    run_id: str | None = None
    date: str | None = None
    step: str | None = None

    @property
    def key(self) -> str:
        """Alerts of one key are the same trouble again: the same title for the same date and step."""
        return hashlib.sha256("\n".join([self.title, self.date or "", self.step or ""]).encode()).hexdigest()[:16]


class _Sent(BaseModel):
    """What was sent, and what was held back: times in seconds since the epoch, and counts, by key."""

    at: dict[str, float] = {}
    held_back: dict[str, int] = {}


class Alerts:
    """Sends alerts, each trouble once in a while.

    Args:
        url: the webhook; None sends nothing.
        state: the file that remembers what was sent, across processes and restarts.
        interval: seconds in which an alert of one key is sent once.
        limit: the most alerts in an interval, of whatever keys.
        redact: masks secrets.
        ui_url: address of the Dagster UI, for a link to the run.
    """

    def __init__(
        self,
        url: str | None,
        *,
        state: Path,
        interval: float,
        limit: int,
        redact: Redactor,
        ui_url: str | None = None,
    ) -> None:
        self._url = url
        self._state = state
        self._interval = interval
        self._limit = limit
        self._redact = redact
        self._ui_url = ui_url

    def send(self, alert: Alert) -> bool:
        """Send an alert unless its like was sent lately; tells whether it arrived, and never raises."""
        if self._url is None:
            return False
        try:
            with self._locked():
                return self._send(self._url, alert)
        except Exception as error:  # noqa: BLE001 - an alert is never worth a run
            _logger.warning("an alert was not sent: %s", self._redact(f"{type(error).__name__}: {error}"))
            return False

    def _send(self, url: str, alert: Alert) -> bool:
        now = time.time()
        sent = self._read(now)
        if alert.key in sent.at or len(sent.at) >= self._limit:
            sent.held_back[alert.key] = sent.held_back.get(alert.key, 0) + 1
            self._write(sent)
            return False
        fault = _post(url, self._text(alert, sent.held_back.pop(alert.key, 0)))
        if fault is not None:
            _logger.warning("the alert %r was not sent: %s", self._redact(alert.title), self._redact(fault))
            return False
        sent.at[alert.key] = now
        self._write(sent)
        return True

    def _text(self, alert: Alert, held_back: int) -> str:
        link = f"{self._ui_url.rstrip('/')}/runs/{alert.run_id}" if self._ui_url and alert.run_id else None
        facts = {
            "Date": alert.date,
            "Step": alert.step,
            "Run": link or alert.run_id,
            "Reason": _shortened(alert.reason),
            "What to do": alert.remedy,
        }
        lines = [f"*{alert.title}*", *(f"{name}: {value}" for name, value in facts.items() if value)]
        if held_back:
            lines.append(f"({held_back} more like this were held back since the last one)")
        # The three characters that Slack's format wants escaped (docs.slack.dev/messaging/formatting-message-text).
        text = self._redact("\n".join(lines))
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Of processes that send at once, each in its turn; without the lock where the disk takes none."""
        try:
            self._state.parent.mkdir(parents=True, exist_ok=True)
            stream = self._state.with_suffix(".lock").open("a")
        except OSError:
            yield
            return
        with stream:
            # Not every shared volume has locks.
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _read(self, now: float) -> _Sent:
        try:
            sent = _Sent.model_validate_json(self._state.read_bytes())
        except (OSError, ValidationError):
            return _Sent()
        at = {key: time_ for key, time_ in sent.at.items() if now - self._interval < time_ <= now}
        # What was held back is told with the next of its key; others are forgotten before they are many.
        newest = dict(list(sent.held_back.items())[-10 * self._limit :])
        return _Sent(at=at, held_back=newest)

    def _write(self, sent: _Sent) -> None:
        try:
            write_bytes_atomically(self._state, sent.model_dump_json().encode())
        except Exception as error:  # noqa: BLE001 - a full disk is what an alert may be about
            _logger.warning("it is not remembered that an alert was sent: %s", error)


def _post(url: str, text: str) -> str | None:
    """Why the webhook did not take the text, or None; passing faults are tried again, for seconds."""
    pause = _FIRST_PAUSE_SECONDS
    fault = ""
    # No redirects: the address is a secret of its own.
    with httpx.Client(timeout=_TIMEOUT_SECONDS, follow_redirects=False) as client:
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(min(pause, _LONGEST_PAUSE_SECONDS))
                pause *= 2
            try:
                response = client.post(url, json={"text": text})
            except httpx.InvalidURL as error:
                return f"ALERT_WEBHOOK_URL is no address: {error}"
            except httpx.HTTPError as error:
                fault = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return None
            fault = f"HTTP {response.status_code}"
            if response.status_code != 429 and response.status_code < 500:
                return fault
            after = response.headers.get("Retry-After", "")
            pause = max(pause, float(after)) if after.isdigit() else pause
    return fault


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."
