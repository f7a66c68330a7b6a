"""Telling a webhook of changes: signed, in order, repeated until they are taken."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import threading
import time

import httpx

from h2o_gateway.store import Callback, Store

_logger = logging.getLogger(__name__)
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 300.0


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """``sha256=`` and the HMAC-SHA256, in hexadecimal, of the time stamp, a full stop and the body."""
    return "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class Webhook:
    """Delivers the store's callbacks from a thread of its own.

    Args:
        store: where they wait.
        url: where they go.
        secret: signs them.
        give_up: seconds after which one is dropped.
    """

    def __init__(self, store: Store, *, url: str, secret: str, give_up: float) -> None:
        self._store = store
        self._url = url
        self._secret = secret
        self._give_up = give_up
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def close(self) -> None:
        """Stop; what has not been delivered waits for the next gateway."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        # No redirects: a signed callback is for the address that was configured.
        with httpx.Client(timeout=10, follow_redirects=False) as client:
            while not self._ended.is_set():
                try:
                    pause = self._deliver_next(client, pause)
                except Exception:
                    _logger.exception("the callbacks cannot be read; the next look follows")
                    self._ended.wait(pause)

    def _deliver_next(self, client: httpx.Client, pause: float) -> float:
        """One trial, or a wait where nothing is to be delivered; returns the pause after the next fault."""
        callback = self._store.next_callback()
        if callback is None:
            self._ended.wait(_FIRST_PAUSE)
            return _FIRST_PAUSE
        fault = self._deliver(client, callback)
        if fault is not None and time.time() - callback.created_at <= self._give_up:
            _logger.warning("callback %s of %s: %s", callback.id, callback.experiment_id, fault)
            self._ended.wait(pause)
            return min(2 * pause, _LONGEST_PAUSE)
        if fault is not None:
            _logger.error("callback %s of %s is given up: %s", callback.id, callback.experiment_id, fault)
        self._store.drop_callback(callback.position)
        return _FIRST_PAUSE

    def _deliver(self, client: httpx.Client, callback: Callback) -> str | None:
        """Why it was not taken, or None."""
        content = {
            "id": callback.id,
            "type": "experiment.status",
            "created_at": callback.created_at,
            "experiment": {"id": callback.experiment_id, "status": callback.status},
        }
        body = json.dumps(content).encode()
        timestamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "X-Gateway-Timestamp": timestamp,
            "X-Gateway-Signature": signature(self._secret, timestamp, body),
        }
        try:
            response = client.post(self._url, content=body, headers=headers)
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        return None if response.is_success else f"HTTP {response.status_code}"
