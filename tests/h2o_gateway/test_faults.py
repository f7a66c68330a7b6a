from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from finetune.base_model.models import BaseModelRef
from h2o_gateway import start
from h2o_gateway.__main__ import main
from h2o_gateway.app import create_app
from h2o_gateway.attempt import Attempt
from h2o_gateway.datasets import Datasets
from h2o_gateway.models import ExperimentRequest
from h2o_gateway.settings import Settings
from h2o_gateway.start import Job
from h2o_gateway.store import Store
from tests.h2o_gateway.conftest import Launch
from tests.h2o_gateway.process import KEY, MODEL, RECORDS, ROOT, GatewayProcess, is_alive, until


def test_a_gateway_killed_in_mid_training_finds_the_training_again_and_sees_it_finish(launch: Launch) -> None:
    gateway = launch()
    identifier = gateway.create("wait", "the-key").json()["id"]
    gateway.started(identifier)
    [pid] = gateway.pids()
    gateway.kill()
    assert is_alive(pid), "the training died with the gateway"
    gateway.start()
    again = gateway.create("wait", "the-key")
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (200, identifier, "running")
    (gateway.output(identifier) / "go").touch()
    ended = gateway.wait(identifier, "finished", "failed")
    assert (ended["status"], ended["attempt"]) == ("finished", 1)
    assert gateway.http.get("/api/experiments").json()["total"] == 1
    assert (len(gateway.starts(identifier)), gateway.pids()) == (1, [pid])


def test_a_training_that_ends_while_no_gateway_looks_is_not_lost(launch: Launch) -> None:
    gateway = launch()
    good, bad = gateway.create("wait").json()["id"], gateway.create("fail").json()["id"]
    gateway.started(good)
    [pid] = gateway.pids()
    gateway.kill()
    (gateway.output(good) / "go").touch()
    until(lambda: not is_alive(pid))
    gateway.start()
    assert gateway.wait(good, "finished", "failed")["status"] == "finished"
    # The queue has outlived it as well.
    assert gateway.wait(bad, "failed")["error"].endswith("80 GiB wanted")


def test_a_gateway_killed_between_its_note_and_the_start_starts_the_training_once(
    launch: Launch, tmp_path: Path
) -> None:
    gateway = launch()
    gateway.upload()
    gateway.kill()
    store = Store(gateway.directory / "gateway.db", callbacks=False)
    dataset = hashlib.sha256(RECORDS).hexdigest()
    row, _ = store.create(ExperimentRequest(dataset_id=dataset, base_model=MODEL, name="quick"))
    assert store.start_next("0")
    assert not (gateway.directory / "experiments" / row.id).exists()
    gateway.start()
    assert gateway.wait(row.id, "finished", "failed")["status"] == "finished"
    assert len(gateway.starts(row.id)) == 1


def test_what_a_killed_gateway_left_half_made_is_cleared_away(launch: Launch) -> None:
    gateway = launch()
    identifier = gateway.create("wait").json()["id"]
    gateway.started(identifier)
    gateway.kill()
    datasets = gateway.directory / "datasets"
    (datasets / ".incoming" / "half.jsonl").write_text("{")
    (datasets / ".abc.tmp-1-2").mkdir()
    (datasets / ".abc.tmp-1-2" / "dataset.jsonl").write_text("{")
    (gateway.directory / "experiments" / identifier / ".adapter.zip.tmp-1-2").write_text("PK")
    gateway.start()
    (gateway.output(identifier) / "go").touch()
    gateway.wait(identifier, "finished")
    assert sorted(path.name for path in datasets.iterdir()) == sorted(
        [".incoming", hashlib.sha256(RECORDS).hexdigest()]
    )
    assert list((datasets / ".incoming").iterdir()) == []
    assert sorted(path.name for path in (gateway.directory / "experiments" / identifier).iterdir()) == [
        "adapter.zip",
        "attempt-1",
    ]


def test_of_several_processes_that_would_train_in_one_place_one_does(gateway: GatewayProcess) -> None:
    identifier = gateway.create("wait").json()["id"]
    gateway.started(identifier)
    directory = gateway.output(identifier).parent
    assert not Attempt(directory).take()
    late = [subprocess.Popen([sys.executable, "-m", "h2o_gateway.start", directory], cwd=ROOT) for _ in range(2)]
    assert [process.wait(180) for process in late] == [0, 0]
    (gateway.output(identifier) / "go").touch()
    gateway.wait(identifier, "finished")
    # Nor does one that comes when it is all over.
    subprocess.run([sys.executable, "-m", "h2o_gateway.start", directory], cwd=ROOT, check=True)
    assert len(gateway.starts(identifier)) == 1


def test_a_training_that_is_killed_has_failed_and_the_next_one_gets_the_device(gateway: GatewayProcess) -> None:
    killed, waiting = (gateway.create("wait").json()["id"] for _ in range(2))
    gateway.started(killed)
    os.kill(gateway.pid(killed), signal.SIGKILL)
    ended = gateway.wait(killed, "failed", "finished")
    assert ended["status"] == "failed"
    assert "has ended unfinished: the stub begins" in ended["error"]
    assert "the stub begins" in ended["log_tail"]
    gateway.started(waiting)
    (gateway.output(waiting) / "go").touch()


def test_children_of_a_killed_training_are_ended_and_do_not_keep_the_device(gateway: GatewayProcess) -> None:
    identifier = gateway.create("fork").json()["id"]
    gateway.started(identifier)
    child = int(until(lambda: (path := gateway.output(identifier) / "child").exists() and path.read_text()))
    os.kill(gateway.pid(identifier), signal.SIGKILL)
    assert gateway.wait(identifier, "failed")["gpu"] == "0"
    assert not is_alive(child)


def test_a_training_that_a_restarted_machine_has_interrupted_begins_anew(launch: Launch) -> None:
    gateway = launch()
    identifier = gateway.create("wait").json()["id"]
    gateway.started(identifier)
    [pid] = gateway.pids()
    gateway.kill()
    os.killpg(pid, signal.SIGKILL)
    # What a reboot leaves: the record of a machine that is no more.
    lock = gateway.output(identifier).parent / "train.lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"machine": "another boot"}))
    gateway.start()
    until(lambda: len(gateway.starts(identifier)) == 2)
    (gateway.output(identifier, attempt=2) / "go").touch()
    ended = gateway.wait(identifier, "finished", "failed")
    assert (ended["status"], ended["attempt"]) == ("finished", 2)


def test_two_devices_train_two_experiments_at_once(launch: Launch) -> None:
    gateway = launch(GPUS="3,5")
    first, second, third = (gateway.create("wait").json()["id"] for _ in range(3))
    # The first may come when the gateway has just looked at one device and not yet at the other.
    devices = [gateway.started(one)["device"] for one in (first, second)]
    assert sorted(devices) == ["3", "5"]
    assert gateway.experiment(third)["status"] == "queued"
    (gateway.output(second) / "go").touch()
    assert gateway.started(third)["device"] == devices[1]


def test_a_second_gateway_on_the_same_data_is_refused(launch: Launch, tiny_model: BaseModelRef) -> None:
    gateway = launch()
    environment = os.environ | {f"H2O_GATEWAY_{name}": value for name, value in gateway.settings.items()}
    second = subprocess.run(
        [sys.executable, "-m", "h2o_gateway"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )
    assert second.returncode == 2
    assert "another gateway works here" in second.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"API_KEY": "", "HOST": "0.0.0.0"}, "a gateway that others can reach needs a key [H2O_GATEWAY_API_KEY]"),
        ({"WEBHOOK_URL": "http://x"}, "needs H2O_GATEWAY_WEBHOOK_SECRET"),
        (
            {"TRAIN_COMMAND": "python train.py"},
            "H2O_GATEWAY_TRAIN_COMMAND: Value error, the command must hold {config}",
        ),
        ({"GPUS": "0,0"}, "H2O_GATEWAY_GPUS"),
        ({"HOST": "192.0.2.1"}, "('192.0.2.1', 8760)). Set H2O_GATEWAY_HOST and H2O_GATEWAY_PORT"),
        ({"DATA_DIR": "/proc/none"}, "/proc/none"),
        ({"MODELS": "x=/no/such/place"}, "H2O_GATEWAY_MODELS"),
    ],
)
def test_wrong_settings_are_one_clear_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, str],
    said: str,
) -> None:
    for name, value in {"DATA_DIR": str(tmp_path), "API_KEY": KEY, **settings}.items():
        monkeypatch.setenv(f"H2O_GATEWAY_{name}", value)
    assert main() == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_damaged_database_is_one_clear_error_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    database = tmp_path / "gateway.db"
    database.write_bytes(b"no database " * 1000)
    for name, value in {"DATA_DIR": str(tmp_path), "API_KEY": KEY, "PORT": "0"}.items():
        monkeypatch.setenv(f"H2O_GATEWAY_{name}", value)
    assert main() == 2
    assert capsys.readouterr().err == f"error: the database cannot be used: file is not a database [{tmp_path}]\n"
    assert database.read_bytes() == b"no database " * 1000


def test_a_database_that_fails_later_is_told_by_every_call(tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path, poll_seconds=60), KEY)
    with TestClient(app, headers={"Authorization": f"Bearer {KEY}"}) as client:
        assert client.get("/api/experiments").status_code == 200
        for path in tmp_path.glob("gateway.db*"):
            path.write_bytes(b"no database " * 1000)
        for call in ("/health", "/api/experiments", "/api/experiments/exp-1"):
            answer = client.get(call)
            assert answer.status_code == 503
            assert answer.json()["detail"].startswith("the gateway's database: ")


def test_an_upload_to_a_full_disk_is_507_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr(Datasets, "new_upload", lambda _: tmp_path / "full")
    # Exclusive creation, which a device that is always full would not pass.
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", *rest, **more: opened(path, mode.replace("x", "w")))
    with TestClient(create_app(Settings(data_dir=tmp_path / "data"), KEY)) as client:
        answer = client.post(
            "/api/datasets",
            files={"file": ("train.jsonl", RECORDS)},
            data={"sha256": hashlib.sha256(RECORDS).hexdigest()},
            headers={"Authorization": f"Bearer {KEY}"},
        )
    assert (answer.status_code, "no space left" in answer.json()["detail"]) == (507, True)
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("missing", ["command", "directory"])
def test_a_command_that_is_not_there_is_told_with_its_setting(
    tmp_path: Path,
    tiny_model: BaseModelRef,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset.jsonl").write_bytes(RECORDS)
    job = Job(
        request=ExperimentRequest(dataset_id="0" * 64, base_model=MODEL),
        name="x",
        dataset=tmp_path / "dataset.jsonl",
        model_path=tiny_model.path,
        cache_dir=tmp_path / "cache",
        command=["no-such-program" if missing == "command" else sys.executable],
        studio_dir=tmp_path / "no-such-directory" if missing == "directory" else tmp_path,
        trust_remote_code=False,
        workers=0,
    )
    Attempt(tmp_path).job.write_text(job.model_dump_json())
    assert start.main(tmp_path) == 1
    said = capsys.readouterr().out
    assert f"no-such-{'program' if missing == 'command' else missing}" in said
    assert "Set H2O_GATEWAY_TRAIN_COMMAND, or H2O_GATEWAY_STUDIO_DIR" in said


class Receiver:
    """Refuses callbacks with 503 until it is `ready`."""

    def __init__(self) -> None:
        self.taken: list[tuple[dict[str, str], bytes]] = []
        self.refused = 0
        self.ready = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if outer.ready:
                    outer.taken.append((dict(self.headers), body))
                else:
                    outer.refused += 1
                self.send_response(204 if outer.ready else 503)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_a_webhook_is_told_of_every_change_in_order_signed_and_again_until_it_takes_it(
    launch: Launch, receiver: Receiver
) -> None:
    gateway = launch(WEBHOOK_URL=receiver.url, WEBHOOK_SECRET="hook-secret")
    identifier = gateway.create("wait").json()["id"]
    gateway.started(identifier)
    until(lambda: receiver.refused)
    gateway.kill()
    receiver.ready = True
    gateway.start()
    (gateway.output(identifier) / "go").touch()
    until(lambda: len(receiver.taken) == 3)
    events = [json.loads(body) for _, body in receiver.taken]
    assert [event["experiment"] for event in events] == [
        {"id": identifier, "status": status} for status in ("queued", "running", "finished")
    ]
    assert len({event["id"] for event in events}) == 3
    for headers, body in receiver.taken:
        signed = headers["X-Gateway-Timestamp"].encode() + b"." + body
        expected = hmac.new(b"hook-secret", signed, hashlib.sha256).hexdigest()
        assert headers["X-Gateway-Signature"] == f"sha256={expected}"
        assert "Authorization" not in headers


def test_without_a_key_one_is_made_for_this_machine_alone(tmp_path: Path, tiny_model: BaseModelRef) -> None:
    gateway = GatewayProcess(tmp_path / "gateway", tiny_model.path, API_KEY="")
    try:
        path = tmp_path / "gateway" / "key"
        assert path.stat().st_mode & 0o777 == 0o600
        key = path.read_text().strip()
        assert gateway.http.get("/api/experiments").status_code == 401
        headers = {"Authorization": f"Bearer {key}"}
        assert gateway.http.get("/api/experiments", headers=headers).status_code == 200
    finally:
        gateway.close()
    assert key not in gateway.said()
