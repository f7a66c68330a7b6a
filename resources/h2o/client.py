"""The four calls over HTTP, repeated while that can help, and never showing the key."""

import json
import logging
import random
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from finetune.errors import ConfigurationError, FinetuneError, RemoteError, TrainingError
from resources.h2o.protocol import Experiment, Protocol, Timing, read_id

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# Too early, too many, and what a busy or restarting server or a proxy before it says.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_ANSWER_BYTES = 4 << 20
_MALFORMED_ANSWERS = 5
_NOT_OFFERED = frozenset({404, 405, 501})


class PassingFailureError(Exception):
    """A call failed in a way that may pass; `retry_after` in seconds is the server's wish."""

    def __init__(self, message: str, *, retry_after: float | None = None, malformed: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.malformed = malformed


class H2OClient:
    """One connection pool to one server; use as a context manager.

    Args:
        api_url: the server's address, without credentials.
        api_key: Bearer key, or None.
        ca_file: PEM file of a private certificate authority, or None for the system's.
        protocol: what the server calls things.
        timing: how long it is waited for.
        on_wait: told why a call is repeated.

    Raises:
        ConfigurationError: the address, the key or the certificate file cannot be used.
    """

    def __init__(
        self,
        api_url: str,
        api_key: str | None,
        *,
        ca_file: str | None = None,
        protocol: Protocol,
        timing: Timing,
        on_wait: Callable[[str], None],
    ) -> None:
        self.protocol = protocol
        self.timing = timing
        self.api_url = _checked_url(api_url)
        self._key = _checked_key(api_key)
        self._on_wait = on_wait
        self._http = httpx.Client(
            base_url=self.api_url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            verify=_tls_context(ca_file),
            timeout=httpx.Timeout(timing.read_timeout, connect=timing.connect_timeout),
            follow_redirects=False,
        )

    def __enter__(self) -> "H2OClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def route(self, template: str, experiment_id: str) -> str:
        """The path of one experiment's call, its id escaped."""
        return template.format(id=quote(experiment_id, safe=""))

    def upload_dataset(self, path: Path, *, name: str, sha256: str) -> str:
        """Stream a JSONL file to the server (multipart: ``file``, ``name``, ``sha256``); returns its id there.

        Raises:
            TrainingError: the server refuses the file, or has stored other bytes.
        """

        def upload() -> str:
            with path.open("rb") as stream:
                answer = self._json(
                    "POST",
                    self.protocol.datasets_route,
                    files={"file": (path.name, stream, "application/x-ndjson")},
                    data={"name": name, self.protocol.sha256_field: sha256},
                    headers={"Idempotency-Key": sha256},
                )
            try:
                identifier = read_id(answer, self.protocol)
            except ValueError as error:
                raise PassingFailureError(f"an unreadable answer to the upload: {error}", malformed=True) from None
            stored = answer.get(self.protocol.sha256_field)
            if stored not in (None, sha256):
                raise PassingFailureError(f"the server stored SHA-256 {str(stored)[:80]} for {sha256}", malformed=True)
            return identifier

        return self.repeated(upload)

    def create_experiment(self, key: str, body: dict[str, Any]) -> Experiment:
        """Create an experiment, unless one with our `key` is there.

        The server is asked for it before each trial of the creation, since an answer may get lost after
        the deed.

        Raises:
            TrainingError: the server refuses the experiment.
        """

        def create() -> Experiment:
            existing = self._find(key)
            if existing is not None:
                return existing
            answer = self._json(
                "POST",
                self.protocol.experiments_route,
                json={**body, self.protocol.key_field: key},
                headers={"Idempotency-Key": key},
            )
            return self._experiment(answer)

        return self.repeated(create)

    def find_experiment(self, key: str) -> Experiment | None:
        """The experiment that was created with our `key`; None too where the server cannot list."""
        return self.repeated(lambda: self._find(key))

    def get_experiment(self, experiment_id: str) -> Experiment:
        """The experiment's state.

        Raises:
            TrainingError: it has vanished.
        """
        route = self.route(self.protocol.experiment_route, experiment_id)
        return self.repeated(lambda: self._experiment(self._json("GET", route)))

    def cancel_experiment(self, experiment_id: str) -> bool:
        """Stop the experiment; False where the server offers no such call or knows it no more."""
        route = self.route(self.protocol.cancel_route, experiment_id)
        return self.repeated(lambda: self._json("POST", route, absent=_NOT_OFFERED) is not None)

    @contextmanager
    def stream(self, route: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """A GET whose body the caller reads; redirects to other hosts are followed without the key.

        Raises:
            PassingFailureError: to be repeated.
            FinetuneError: see `_refusal`.
        """
        with self._transport_errors():
            request = self._http.build_request("GET", route, headers={"Accept-Encoding": "identity", **headers})
            # httpx drops Authorization when a redirect leaves the origin.
            response = self._http.send(request, stream=True, follow_redirects=True)
            try:
                if self.api_url.startswith("https:") and response.url.scheme != "https":
                    raise ConfigurationError(
                        "the H2O server redirects the download to an unencrypted address", where=response.url.host
                    )
                if response.status_code not in (200, 206, 416):
                    self._read(response)
                    self._raise_for(response)
                yield response
            finally:
                response.close()

    def repeated(self, call: Callable[[], _T]) -> _T:
        """Repeat a call while it fails in passing, until the retry budget is spent.

        Raises:
            RemoteError: the budget is spent, or the answers make no sense time and again.
        """
        spent = 0.0
        malformed = 0
        for trial in range(1 << 30):
            begun = time.monotonic()
            try:
                return call()
            except PassingFailureError as failure:
                malformed += failure.malformed
                pause = failure.retry_after
                if pause is None:
                    pause = backoff(self.timing.retry, self.timing.retry_ceiling, trial)
                # A transfer that went well for hours before it broke is no outage of hours.
                spent += pause + min(time.monotonic() - begun, self.timing.retry_ceiling)
                if spent > self.timing.retry_budget or malformed == _MALFORMED_ANSWERS:
                    raise RemoteError(
                        f"the H2O server could not be worked with in {trial + 1} trials: {failure}",
                        where=self.api_url,
                        remedy="Check H2O_API_URL and the server; a later run goes on where this one stopped",
                    ) from None
                message = f"{failure}; trying again in {pause:.1f} s"
                _logger.warning("%s: %s", self.api_url, message)
                self._on_wait(message)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _find(self, key: str) -> Experiment | None:
        protocol = self.protocol
        answer = self._json("GET", protocol.experiments_route, params={protocol.key_field: key}, absent=_NOT_OFFERED)
        listed = answer.get(protocol.list_field, []) if isinstance(answer, dict) else answer
        for item in listed if isinstance(listed, list) else []:
            # A server that knows no such filter lists everything.
            if isinstance(item, dict) and key in (item.get(protocol.key_field), item.get("name")):
                return self._experiment(item)
        return None

    def _experiment(self, answer: Any) -> Experiment:
        try:
            experiment = Experiment.read(answer, self.protocol)
        except ValidationError as error:
            wrong = "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())
            raise PassingFailureError(f"an unreadable answer: {wrong}", malformed=True) from None
        except (ValueError, OverflowError) as error:
            raise PassingFailureError(f"an unreadable answer: {error}", malformed=True) from error
        said = {name: self._shown(getattr(experiment, name)) for name in ("error", "log_tail", "url")}
        return experiment.model_copy(update=said)

    def _json(self, method: str, route: str, *, absent: frozenset[int] = frozenset(), **arguments: Any) -> Any:
        """One request and its JSON; None for the status codes in `absent`."""
        with self._transport_errors():
            request = self._http.build_request(method, route, **arguments)
            response = self._http.send(request, stream=True)
            try:
                content = self._read(response)
            finally:
                response.close()
        if response.status_code in absent:
            return None
        if not response.is_success:
            self._raise_for(response)
        try:
            return json.loads(content) if content else {}
        except (ValueError, RecursionError) as error:
            raise PassingFailureError(
                f"an answer that is no JSON: {self._shown(content[:200].decode(errors='replace'))}", malformed=True
            ) from error

    def _read(self, response: httpx.Response) -> bytes:
        """The body, as far as its size and its time are bearable; kept as `response.content`."""
        deadline = time.monotonic() + self.timing.answer_timeout
        content = bytearray()
        for piece in response.iter_bytes():
            content += piece
            if len(content) > _ANSWER_BYTES:
                raise PassingFailureError(f"an answer of more than {_ANSWER_BYTES} bytes", malformed=True)
            if time.monotonic() > deadline:
                raise PassingFailureError(f"an answer that took more than {self.timing.answer_timeout:g} s")
        response.extensions["content"] = bytes(content)
        return bytes(content)

    def _raise_for(self, response: httpx.Response) -> None:
        message = self._shown(_server_message(response.extensions.get("content", b"")))
        status = response.status_code
        if status in _PASSING:
            raise PassingFailureError(f"HTTP {status}: {message}", retry_after=_retry_after(response))
        raise self._refusal(response, f"HTTP {status}: {message}" if message else f"HTTP {status}")

    def _refusal(self, response: httpx.Response, said: str) -> FinetuneError:
        where = self._shown(f"{response.request.method} {response.url.copy_with(query=None)}")
        status = response.status_code
        if status in (401, 403):
            return ConfigurationError(f"the H2O server refuses the key: {said}", where=where, remedy="Set H2O_API_KEY")
        if response.has_redirect_location:
            location = httpx.URL(response.headers["Location"])
            target = self._shown(location.host or location.path)
            return ConfigurationError(
                f"the H2O server redirects to {target}, where the key will not be sent",
                where=where,
                remedy="Set H2O_API_URL to the address that answers itself",
            )
        if status == 404:
            return TrainingError(
                f"the H2O server does not know it: {said}",
                where=where,
                remedy="The experiment has vanished, or H2O_API_URL or the routes in H2O_PROTOCOL are wrong",
            )
        return TrainingError(
            f"the H2O server refuses the request: {said}", where=where, remedy="Correct what the message names"
        )

    @contextmanager
    def _transport_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.TooManyRedirects:
            raise ConfigurationError("the H2O server redirects in a circle", where=self.api_url) from None
        except httpx.RequestError as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, ssl.SSLCertVerificationError):
                    raise ConfigurationError(
                        f"the H2O server's certificate is not trusted: {cause.verify_message}",
                        where=self.api_url,
                        remedy="Name the private authority's PEM file in H2O_CA_FILE",
                    ) from None
                cause = cause.__cause__ or cause.__context__
            raise PassingFailureError(
                f"{type(error).__name__}: {self._shown(str(error))}", malformed=isinstance(error, httpx.DecodingError)
            ) from None

    def _shown(self, text: str) -> str:
        # JSON may spell halves of characters, which no log takes.
        text = text.encode(errors="backslashreplace").decode()
        return text.replace(self._key, "***") if self._key else text


def backoff(first: float, ceiling: float, trial: int) -> float:
    """Seconds to wait after trial number `trial` (from 0): doubling up to `ceiling`, less up to a half."""
    # The exponent is bounded because floats are.
    return min(ceiling, first * 2.0 ** min(trial, 60)) * random.uniform(0.5, 1)  # noqa: S311 - jitter, no secret


def _retry_after(response: httpx.Response) -> float | None:
    """RFC 9110, 10.2.3: seconds, or a date, which is read by the server's own clock."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
        now = parsedate_to_datetime(response.headers.get("Date", ""))
        return max(0.0, (until - now).total_seconds())
    except (ValueError, TypeError):
        return None


def _server_message(content: bytes) -> str:
    text = content.decode(errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        pass
    else:
        if isinstance(answer, dict):
            said = answer.get("detail") or answer.get("message") or answer.get("error") or answer
            text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return " ".join(text.split())[:500]


def _checked_url(api_url: str) -> str:
    remedy = "Write H2O_API_URL as https://host[:port][/path]; the key belongs into H2O_API_KEY"
    try:
        url = httpx.URL(api_url.strip())
    except httpx.InvalidURL:
        raise ConfigurationError("not an address", where="H2O_API_URL", remedy=remedy) from None
    if url.userinfo:
        raise ConfigurationError("the address holds credentials", where="H2O_API_URL", remedy=remedy)
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigurationError("not an http or https address", where="H2O_API_URL", remedy=remedy)
    return str(url).rstrip("/")


def _checked_key(api_key: str | None) -> str:
    # Secrets that come out of files often end in a line break.
    key = (api_key or "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise ConfigurationError(
            "the key holds characters that an HTTP header cannot",
            where="H2O_API_KEY",
            remedy="Set it to the key alone, without spaces and line breaks",
        )
    return key


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ConfigurationError(
            f"the certificate authority's file cannot be used: {error}",
            where=ca_file,
            remedy="Set H2O_CA_FILE to a readable PEM file",
        ) from error
