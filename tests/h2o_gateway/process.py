"""A gateway in a process of its own, over loopback."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

KEY = "gateway-key-77c0"
ROOT = Path(__file__).parents[2]
STUB = f"{sys.executable} {Path(__file__).with_name('stub_train.py')} -Y {{config}}"
REAL = f"{sys.executable} {Path(__file__).with_name('h2o_train.py')} -Y {{config}}"
MODEL = "tiny"
RECORDS = b'{"instruction": "Say hi", "output": "hi"}\n{"instruction": "Say ho", "output": "ho"}\n'


def until(condition: Callable[[], Any], seconds: float = 180) -> Any:
    """What the condition gives once that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.05)
    return value


class GatewayProcess:
    """`python -m h2o_gateway` with its data in `directory`; settings by their names."""

    def __init__(self, directory: Path, model: Path, **settings: str) -> None:
        self.directory = directory
        self.settings = {
            "API_KEY": KEY,
            "DATA_DIR": str(directory),
            "PORT": "0",
            "POLL_SECONDS": "0.1",
            "TRAIN_COMMAND": STUB,
            "STUDIO_DIR": str(ROOT),
            "MODELS": f"{MODEL}={model}",
            "ALLOW_HUB": "false",
            **settings,
        }
        self.start()

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("H2O_GATEWAY_")}
        environment |= {f"H2O_GATEWAY_{name}": value for name, value in self.settings.items()}
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with self.directory.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "h2o_gateway"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        first = self.process.stdout.readline().decode()
        assert first.startswith("H2O LLM Studio gateway: "), self.said()
        self.url = first.split()[4]
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    def said(self) -> str:
        return self.directory.with_suffix(".log").read_text()

    def kill(self) -> None:
        """SIGKILL to the gateway alone."""
        self.process.kill()
        self.process.wait()
        self.http.close()

    def close(self) -> None:
        """End it, and what it has left training."""
        self.process.terminate()
        self.process.wait(timeout=120)
        self.http.close()
        for pid in self.pids():
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def upload(self, content: bytes = RECORDS, sha256: str | None = None) -> httpx.Response:
        return self.http.post(
            "/api/datasets",
            files={"file": ("train.jsonl", content)},
            data={"name": "mine", "sha256": sha256 or hashlib.sha256(content).hexdigest()},
        )

    def create(self, behaviour: str = "quick", key: str | None = None, **fields: Any) -> httpx.Response:
        self.upload()
        dataset = hashlib.sha256(RECORDS).hexdigest()
        body = {"name": behaviour, "dataset_id": dataset, "base_model": MODEL, "config": {}, **fields}
        return self.http.post("/api/experiments", json=body | ({"idempotency_key": key} if key else {}))

    def experiment(self, identifier: str) -> dict[str, Any]:
        answer = self.http.get(f"/api/experiments/{identifier}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait(self, identifier: str, *statuses: str) -> dict[str, Any]:
        return dict(until(lambda: (seen := self.experiment(identifier))["status"] in statuses and seen))

    def output(self, identifier: str, attempt: int = 1) -> Path:
        return self.directory / "experiments" / identifier / f"attempt-{attempt}" / "output"

    def starts(self, identifier: str) -> list[Path]:
        """What each start of the stub has left behind."""
        return sorted(self.directory.glob(f"experiments/{identifier}/attempt-*/output/start-*.json"))

    def pids(self) -> list[int]:
        """The leaders of all trainings that were ever started."""
        locks = self.directory.glob("experiments/*/attempt-*/train.lock")
        return [json.loads(content)["pid"] for lock in locks if (content := lock.read_bytes())]

    def pid(self, identifier: str) -> int:
        """The leader of an experiment's only training."""
        [lock] = self.directory.glob(f"experiments/{identifier}/attempt-*/train.lock")
        return int(json.loads(lock.read_bytes())["pid"])

    def started(self, identifier: str) -> dict[str, Any]:
        """The note of the stub's only start, once it is there."""
        [note] = until(lambda: self.starts(identifier))
        return dict(until(lambda: note.read_text() and json.loads(note.read_text())))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
