"""Whom the client talks to: redirects, addresses, certificates, and where its key goes."""

import logging
import os
import ssl
from pathlib import Path

import pytest
import trustme

from finetune.errors import ConfigurationError, TrainingError
from finetune.progress import ProgressEvent
from finetune.training.models import TrainingRequest
from resources.h2o.protocol import Timing
from resources.h2o_trainer import H2OTrainer
from tests.resources.h2o_server import (
    KEY,
    H2OServer,
    says,
)
from tests.resources.h2o_training import FAST, train, trainer_for


def test_the_key_does_not_follow_a_redirect_to_another_host(server: H2OServer, request_: TrainingRequest) -> None:
    other = H2OServer()
    other.key = "another"
    try:
        server.faults["download"] = [says(302, b"", Location=f"{other.url}/api/experiments/exp%2F1/download")]
        other.experiments["exp/1"] = {"status": "finished"}
        other.faults["download"] = [lambda handler: handler.download("exp%2F1") or True]
        train(trainer_for(server), request_)
        assert server.struck == ["download"]
        assert other.calls == ["download"]
        assert other.authorizations == [None]
    finally:
        other.close()


def test_a_download_that_is_redirected_in_a_circle_is_an_error(server: H2OServer, request_: TrainingRequest) -> None:
    server.faults["download"] = [says(302, b"", Location="download")] * 100
    with pytest.raises(ConfigurationError, match="redirects in a circle"):
        train(trainer_for(server), request_)
    assert server.struck.count("download") > 5


def test_a_download_is_not_followed_out_of_tls(
    server: H2OServer, request_: TrainingRequest, authority: trustme.CA, tmp_path: Path
) -> None:
    plain = H2OServer()
    try:
        url = over_tls(server, authority, "127.0.0.1")
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        server.faults["download"] = [says(302, b"", Location=f"{plain.url}/adapter.zip")]
        plain.faults["unknown"] = [lambda handler: handler.reply(200, server.archive) or True]
        trainer = H2OTrainer(api_url=url, api_key=KEY, timing=Timing(**FAST), ca_file=str(tmp_path / "ca.pem"))
        with pytest.raises(ConfigurationError, match="redirects the download to an unencrypted address"):
            train(trainer, request_)
        assert server.struck == ["download"]
        assert plain.authorizations == [None]
        assert not request_.adapter_dir.exists()
    finally:
        plain.close()


@pytest.mark.parametrize("call", ["upload", "create", "poll"])
def test_a_redirected_call_is_an_error_that_names_the_other_host(
    server: H2OServer, request_: TrainingRequest, call: str
) -> None:
    server.faults[call] = [says(307, b"", Location="http://evil.invalid/api")]
    with pytest.raises(ConfigurationError, match=r"redirects to evil\.invalid.*H2O_API_URL"):
        train(trainer_for(server), request_)
    assert server.struck == [call]


def test_the_key_is_in_nothing_that_is_written_or_said(
    server: H2OServer, request_: TrainingRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    events: list[ProgressEvent] = []
    # A server that repeats what it was sent.
    server.faults["poll"] = [says(500, f'{{"detail": "bad header Bearer {KEY}"}}'.encode())]
    server.faults["create"] = [says(422, f"Authorization: Bearer {KEY}".encode())]
    with pytest.raises(TrainingError, match=r"Bearer \*\*\*") as caught:
        train(trainer_for(server), request_, events)
    train(trainer_for(server), request_, events)
    assert server.struck == ["create", "poll"]
    assert KEY not in "".join(map(str, events)) + caplog.text + str(caught.value) + repr(trainer_for(server))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("url", "key", "names"),
    [
        ("https://user:pa55word@host", None, "H2O_API_URL"),
        ("ftp://host", None, "H2O_API_URL"),
        ("host:8080", None, "H2O_API_URL"),
        ("https://host", "pa55word\nX-Evil: 1", "H2O_API_KEY"),
        ("https://host", "pa55wordключ", "H2O_API_KEY"),
    ],
)
def test_an_address_or_key_that_cannot_be_used_is_named_and_not_repeated(
    request_: TrainingRequest, url: str, key: str | None, names: str
) -> None:
    with pytest.raises(ConfigurationError, match=names) as caught:
        train(H2OTrainer(api_url=url, api_key=key), request_)
    assert "pa55word" not in str(caught.value)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def over_tls(server: H2OServer, authority: trustme.CA, name: str) -> str:
    """Let the server speak TLS with a certificate for `name`; returns its new address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    # The handshake is the connection's thread's, so that a refused one does not end the listener.
    server.listener.socket = context.wrap_socket(
        server.listener.socket, server_side=True, do_handshake_on_connect=False
    )
    return server.url.replace("http:", "https:")


def test_a_certificate_of_a_private_authority_is_trusted_by_setting_alone(
    server: H2OServer, request_: TrainingRequest, authority: trustme.CA, tmp_path: Path
) -> None:
    url = over_tls(server, authority, "127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    timing = Timing(**FAST)
    with pytest.raises(ConfigurationError, match=r"not trusted: unable to get local issuer.*H2O_CA_FILE"):
        train(H2OTrainer(api_url=url, api_key=KEY, timing=timing), request_)
    assert server.calls == []
    trusted = H2OTrainer(api_url=url, api_key=KEY, timing=timing, ca_file=str(tmp_path / "ca.pem"))
    assert train(trusted, request_).status == "completed"


def test_a_trusted_certificate_for_another_name_is_refused_before_the_key_is_sent(
    server: H2OServer, request_: TrainingRequest, authority: trustme.CA, tmp_path: Path
) -> None:
    url = over_tls(server, authority, "h2o.internal")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with pytest.raises(ConfigurationError, match="not trusted: IP address mismatch"):
        train(H2OTrainer(api_url=url, api_key=KEY, timing=Timing(**FAST), ca_file=str(tmp_path / "ca.pem")), request_)
    assert server.calls == []


def test_a_missing_authority_file_is_named(request_: TrainingRequest) -> None:
    with pytest.raises(ConfigurationError, match=r"/nowhere/ca\.pem.*H2O_CA_FILE"):
        train(H2OTrainer(api_url="https://127.0.0.1:1", ca_file="/nowhere/ca.pem"), request_)


def test_the_key_may_come_from_a_file_with_a_line_break(server: H2OServer, request_: TrainingRequest) -> None:
    trainer = H2OTrainer(api_url=server.url, api_key=f"{KEY}\n", timing=Timing(**FAST))
    assert train(trainer, request_).status == "completed"
    assert os.environ.get("H2O_API_KEY") is None
