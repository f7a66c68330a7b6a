from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
import socket
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from finetune.base_model.models import BaseModelRef
from h2o_gateway.app import create_app
from h2o_gateway.settings import Settings
from tests.h2o_gateway.process import KEY, RECORDS, GatewayProcess, is_alive, until


def test_an_uploaded_dataset_is_kept_once_under_its_hash(gateway: GatewayProcess) -> None:
    content = b'{"text": "once"}\n'
    first, again = gateway.upload(content), gateway.upload(content)
    assert (first.status_code, again.status_code) == (201, 200)
    digest = hashlib.sha256(content).hexdigest()
    expected = {"id": digest, "sha256": digest, "name": "mine", "bytes": len(content), "records": 1}
    assert first.json() == again.json() == expected
    assert (gateway.directory / "datasets" / digest / "dataset.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    ("content", "sha256", "said"),
    [
        (b'{"text": "other"}\n', "0" * 64, "sha256: the file that came has "),
        (b'{"text": "fine"}\n{"text": ""}\n', None, "line 2 is no training record: empty_text (text)"),
        (b"not json\n", None, "line 1 is no JSON object"),
        (b"\n", None, "no records"),
    ],
)
def test_a_bad_dataset_is_refused_and_nothing_of_it_is_kept(
    gateway: GatewayProcess, content: bytes, sha256: str | None, said: str
) -> None:
    answer = gateway.upload(content, sha256)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]
    assert not (gateway.directory / "datasets" / hashlib.sha256(content).hexdigest()).exists()
    assert list((gateway.directory / "datasets" / ".incoming").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{}", "application/json"),
        (b"garbage", "multipart/form-data; boundary=x"),
        (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nhalf', "multipart/form-data; boundary=x"),
        (
            b'--x\r\nContent-Disposition: form-data; name="sha256"\r\n\r\n0\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
        ),
        (b'--x\r\nContent-Disposition: form-data; name="' + b"a" * 100_000, "multipart/form-data; boundary=x"),
        (b"--" + b"x" * 1000, f"multipart/form-data; boundary={'x' * 1000}"),
    ],
)
def test_a_broken_form_is_refused(gateway: GatewayProcess, content: bytes, kind: str) -> None:
    answer = gateway.http.post("/api/datasets", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 422, answer.text
    assert list((gateway.directory / "datasets" / ".incoming").iterdir()) == []


def pieces(total: int) -> Iterator[bytes]:
    yield b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
    for _ in range(total // 1000):
        yield b" " * 1000


@pytest.mark.parametrize("announced", [True, False], ids=["with-length", "chunked"])
def test_a_body_over_the_limit_ends_in_413_with_the_reason_and_leaves_nothing(
    gateway: GatewayProcess, announced: bool
) -> None:
    content: Any = b"".join(pieces(400_000)) if announced else pieces(400_000)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = gateway.http.post("/api/datasets", content=content, headers=headers)
    assert answer.status_code == 413
    assert "larger than" in answer.json()["detail"]
    assert list((gateway.directory / "datasets" / ".incoming").iterdir()) == []
    small = b" " * 30_000 if announced else (b" " * 1000 for _ in range(30))
    assert gateway.http.post("/api/experiments", content=small).status_code == 413


def connected(gateway: GatewayProcess, *head: str) -> socket.socket:
    """A connection that has sent a head."""
    connection = socket.create_connection((httpx.URL(gateway.url).host, httpx.URL(gateway.url).port or 0), timeout=20)
    connection.sendall("\r\n".join((*head, "Host: x", "", "")).encode())
    return connection


def answer_to(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: connection.recv(65536), b""))
    return b""


@pytest.mark.parametrize("key", [KEY, "guessed"])
def test_a_body_without_an_end_is_not_read_for_ever(gateway: GatewayProcess, key: str) -> None:
    head = ("POST /api/experiments HTTP/1.1", f"Authorization: Bearer {key}", "Transfer-Encoding: chunked")
    piece, sent = b"10000\r\n" + b" " * 65536 + b"\r\n", 0
    with connected(gateway, *head) as connection, contextlib.suppress(ConnectionError):
        while sent < 200 << 20:
            connection.sendall(piece)
            sent += len(piece)
    assert sent < 100 << 20


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [("/api/datasets", 100, b"408"), ("/api/experiments", 100, b"408"), ("/api/datasets", 1 << 40, b"413")],
)
def test_a_body_that_pauses_is_given_up_and_leaves_nothing(
    gateway: GatewayProcess, path: str, length: int, status: bytes
) -> None:
    head = (
        "Authorization: Bearer " + KEY,
        f"Content-Length: {length}",
        "Content-Type: multipart/form-data; boundary=x",
    )
    with connected(gateway, f"POST {path} HTTP/1.1", *head) as connection:
        connection.sendall(b"--x\r\n")
        assert answer_to(connection).startswith(b"HTTP/1.1 " + status)
    assert list((gateway.directory / "datasets" / ".incoming").iterdir()) == []


def test_a_head_without_an_end_is_refused(gateway: GatewayProcess) -> None:
    def answered(length: int) -> bytes:
        head = ("GET /health HTTP/1.1", "X: " + "a" * length, "Connection: close")
        with contextlib.suppress(ConnectionError), connected(gateway, *head) as connection:
            return answer_to(connection)
        return b""

    assert answered(5_000).startswith(b"HTTP/1.1 200")
    assert not answered(5_000_000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "header", [None, "", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer ключ", f"Basic {KEY}"]
)
def test_without_the_key_every_call_is_401_before_its_body_is_read(gateway: GatewayProcess, header: str | None) -> None:
    headers = {"Authorization": header.encode()} if header is not None else {}
    with httpx.Client(base_url=gateway.url, headers=headers) as http:
        for method, path in [
            ("POST", "/api/datasets"),
            ("POST", "/api/experiments"),
            ("GET", "/api/experiments"),
            ("GET", "/api/experiments/x/download"),
            ("POST", "/api/experiments/x/cancel"),
            ("GET", "/api/no-such-route"),
        ]:
            answer = http.request(method, path, content=b"{" if method == "POST" else None)
            assert (answer.status_code, answer.json()) == (401, {"detail": "unknown key"})
        assert http.get("/health").json()["status"] == "ok"


def test_keys_are_compared_by_digests_of_one_length_and_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def note(given: bytes, own: bytes) -> bool:
        compared.append((given, own))
        return compare(given, own)

    monkeypatch.setattr(hmac, "compare_digest", note)
    with TestClient(create_app(Settings(data_dir=tmp_path), KEY)) as client:
        for key, status in [("", 401), ("x" * 1000, 401), (KEY, 200)]:
            answer = client.get("/api/experiments", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status
    digests = [hashlib.sha256(f"Bearer {key}".encode()).digest() for key in ("", "x" * 1000, KEY)]
    assert [pair for pair in compared if pair[1] == digests[2]] == [(digest, digests[2]) for digest in digests]


def test_an_experiment_is_trained_and_its_adapter_downloaded_whole_and_by_range(gateway: GatewayProcess) -> None:
    created = gateway.create("quick")
    assert created.status_code == 201
    ended = gateway.wait(created.json()["id"], "finished", "failed")
    assert ended["status"] == "finished", ended
    assert ended["started_at"] < ended["finished_at"]
    assert ended["metrics"]["gpu_hours"] > 0
    route = f"/api/experiments/{ended['id']}/download"
    whole = gateway.http.get(route)
    assert hashlib.sha256(whole.content).hexdigest() == ended["sha256"] == whole.headers["X-Checksum-Sha256"]
    assert len(whole.content) == ended["bytes"]
    assert zipfile.ZipFile(io.BytesIO(whole.content)).namelist() == [
        "adapter_model/adapter_config.json",
        "adapter_model/adapter_model.safetensors",
        "adapter_model/training_log.jsonl",
    ]
    rest = gateway.http.get(route, headers={"Range": "bytes=1000-", "If-Range": whole.headers["ETag"]})
    assert (rest.status_code, rest.content) == (206, whole.content[1000:])
    assert rest.headers["Content-Range"] == f"bytes 1000-{len(whole.content) - 1}/{len(whole.content)}"
    changed = gateway.http.get(route, headers={"Range": "bytes=1000-", "If-Range": '"another"'})
    assert (changed.status_code, changed.content) == (200, whole.content)
    behind = gateway.http.get(route, headers={"Range": f"bytes={len(whole.content)}-"})
    assert (behind.status_code, behind.headers["Content-Range"]) == (416, f"bytes */{len(whole.content)}")


def test_an_experiments_directory_holds_what_was_asked_for_and_nothing_half_made(gateway: GatewayProcess) -> None:
    ended = gateway.wait(gateway.create("quick").json()["id"], "finished")
    directory = gateway.directory / "experiments" / ended["id"]
    assert sorted(path.name for path in directory.iterdir()) == ["adapter.zip", "attempt-1"]
    assert sorted(path.name for path in (directory / "attempt-1").iterdir()) == [
        "config.yaml",
        "dataset.parquet",
        "job.json",
        "output",
        "train.lock",
        "train.log",
    ]
    assert KEY not in "".join(
        path.read_text() for path in (directory / "attempt-1").glob("*.*") if path.suffix != ".parquet"
    )
    assert not any(name.startswith("H2O_GATEWAY_") for name in gateway.started(ended["id"])["environment"])


def test_an_idempotency_key_gives_one_experiment_however_often_and_at_once_it_is_used(gateway: GatewayProcess) -> None:
    gateway.upload()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: gateway.create("quick", "the-key"), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    [identifier] = {answer.json()["id"] for answer in answers}
    listed = gateway.http.get("/api/experiments", params={"idempotency_key": "the-key"}).json()
    assert (listed["total"], [one["id"] for one in listed["experiments"]]) == (1, [identifier])
    gateway.wait(identifier, "finished")
    assert len(gateway.starts(identifier)) == 1
    other = gateway.create("wait", "the-key")
    assert (other.status_code, "the-key" in other.text) == (409, False)
    header = gateway.http.post(
        "/api/experiments",
        json={"dataset_id": hashlib.sha256(RECORDS).hexdigest(), "base_model": "tiny", "idempotency_key": "a"},
        headers={"Idempotency-Key": "b"},
    )
    assert header.status_code == 422


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dataset_id": "../../etc"}, "dataset_id: no such dataset"),
        ({"base_model": "/etc"}, "base_model: not one of H2O_GATEWAY_MODELS (tiny)"),
        ({"config": {"method": "prefix"}}, "config.method: H2O LLM Studio trains lora and qlora, not prefix"),
        ({"config": {"use_pissa": True, "epochs": 0.5}}, "config.epochs: H2O LLM Studio counts whole epochs, not 0.5"),
        ({"config": {"lora_rank": 0}}, "config.lora_rank: "),
        ({"config": {"surprise": 1}}, "config.surprise: Extra inputs"),
        ({"config": {"target_modules": ["a,b"]}}, "config.target_modules: "),
    ],
)
def test_what_cannot_be_trained_is_refused_by_the_fields_name(
    gateway: GatewayProcess, fields: dict[str, Any], said: str
) -> None:
    answer = gateway.create("quick", **fields)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (rb'{"name": "\ud800", "\udfff": 1}', 422),
        (b'{"config": {"lora_alpha": NaN}}', 422),
        (b'{"config": {"learning_rate": 1e999}}', 422),
        (b'{"config": {"seed": ' + b"9" * 5000 + b"}}", 400),
        (b"[" * 15_000, 400),
        (b"\xff", 400),
        (b'{"name": "../../x"}', 422),
        (b'{"name": ".."}', 422),
        (b'{"name": "\\u0000"}', 422),
    ],
    ids=["surrogate", "nan", "infinity", "digits", "depth", "no-utf8", "path", "dots", "nul"],
)
def test_a_request_made_to_break_things_is_a_clear_refusal(
    gateway: GatewayProcess, content: bytes, status: int
) -> None:
    answer = gateway.http.post("/api/experiments", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, list(answer.json())) == (status, ["detail"])


def test_the_base_model_must_be_the_clients(gateway: GatewayProcess, tiny_model: BaseModelRef) -> None:
    same = gateway.create("quick", base_model_fingerprint=tiny_model.fingerprint).json()["id"]
    other = gateway.create("quick", base_model_fingerprint="0" * 64).json()["id"]
    assert gateway.wait(same, "finished", "failed")["status"] == "finished"
    ended = gateway.wait(other, "finished", "failed")
    assert ended["status"] == "failed"
    assert "another one than the client's" in ended["error"]


def test_with_one_device_experiments_wait_for_each_other_in_order(gateway: GatewayProcess) -> None:
    first, second, third = (gateway.create("wait").json()["id"] for _ in range(3))
    gateway.started(first)
    assert gateway.experiment(first)["metrics"] == {}, "no figure may look like progress where there is none"
    assert [gateway.experiment(one)["queue_position"] for one in (first, second, third)] == [None, 1, 2]
    assert gateway.http.get("/health").json() == {"status": "ok", "queued": 2, "running": 1, "gpus": 1}
    cancelled = gateway.http.post(f"/api/experiments/{second}/cancel").json()
    assert cancelled["status"] == "stopped"
    assert gateway.experiment(third)["queue_position"] == 1
    assert gateway.starts(third) == []
    (gateway.output(first) / "go").touch()
    begun = [gateway.started(first)["begun"], gateway.started(third)["begun"]]
    (gateway.output(third) / "go").touch()
    gateway.wait(third, "finished")
    assert gateway.experiment(first)["finished_at"] <= gateway.experiment(third)["started_at"]
    assert begun == sorted(begun)
    assert gateway.starts(second) == []


@pytest.mark.parametrize("behaviour", ["wait", "deaf"])
def test_a_cancelled_training_is_ended_even_if_it_will_not_go(gateway: GatewayProcess, behaviour: str) -> None:
    identifier = gateway.create(behaviour).json()["id"]
    gateway.started(identifier)
    if behaviour == "deaf":
        until((gateway.output(identifier) / "deaf").exists)
    pid = gateway.pid(identifier)
    assert is_alive(pid)
    assert gateway.http.post(f"/api/experiments/{identifier}/cancel").status_code == 200
    assert gateway.wait(identifier, "stopped")["error"] == "cancelled"
    assert not is_alive(pid)
    again = gateway.http.post(f"/api/experiments/{identifier}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "stopped")
    assert gateway.http.get(f"/api/experiments/{identifier}/download").status_code == 409


def test_a_training_that_fails_tells_why_and_shows_its_log(gateway: GatewayProcess) -> None:
    identifier = gateway.create("fail").json()["id"]
    ended = gateway.wait(identifier, "failed")
    assert ended["error"].endswith("RuntimeError: CUDA out of memory: 80 GiB wanted")
    assert "the stub begins" in ended["log_tail"]
    log = gateway.http.get(f"/api/experiments/{identifier}/logs", params={"lines": 2}).text.splitlines()
    assert (len(log), log[-1]) == (2, "RuntimeError: CUDA out of memory: 80 GiB wanted")


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [("empty", "adapter_model/adapter_config.json is missing"), ("torn", "the adapter's weights are damaged")],
)
def test_a_training_that_finishes_without_a_whole_adapter_has_failed(
    gateway: GatewayProcess, behaviour: str, said: str
) -> None:
    ended = gateway.wait(gateway.create(behaviour).json()["id"], "failed", "finished")
    assert said in ended["error"]
    assert not (gateway.directory / "experiments" / ended["id"] / "adapter.zip").exists()


@pytest.mark.parametrize("revision", ["../../../etc/passwd", "a/../b", "-x", "a b", ""])
def test_a_revision_is_no_path(gateway: GatewayProcess, revision: str) -> None:
    answer = gateway.create(base_model_revision=revision)
    assert (answer.status_code, answer.json()["detail"]) == (422, "base_model_revision: no branch, tag or commit")


def test_an_unknown_experiment_is_404_at_every_call(gateway: GatewayProcess) -> None:
    for method, call in [("GET", ""), ("GET", "/logs"), ("GET", "/download"), ("POST", "/cancel")]:
        answer = gateway.http.request(method, f"/api/experiments/exp-none{call}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "no such experiment"})
