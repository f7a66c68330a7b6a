"""Images whose containers start at once: a process that has imported what the image holds, and forks for each.

`python image.py MODULE...` imports the modules, then starts a container for each JSON line of its standard
input (``arguments``, ``environment``, ``directory``, ``log``), and answers with lines of its own: ``{"pid": ...}``
for what was started, ``{"pid": ..., "code": ...}`` for what has ended. The only program in an image is ``dagster``.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

SLIM = ["dagster._cli", "dagster_k8s", "dagster_postgres", "pydantic_settings", "httpx", "tokenizers", "jinja2"]
TRAIN = [*SLIM, "torch", "transformers", "peft", "trl", "safetensors.torch"]


class Process:
    """A container's first process, which is a child of its image's process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None
        self._ended = threading.Event()

    def end(self, code: int) -> None:
        self.code = code
        self._ended.set()

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def freeze(self) -> None:
        """Stand still, as if what it computes took long, until it is asked to end."""
        self._signal(signal.SIGSTOP)

    def kill(self) -> None:
        """SIGKILL to it and to all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        self._ended.wait(30)

    def _signal(self, number: int) -> None:
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Image:
    """An image on the machine; its containers see nothing of the environment that it was loaded with."""

    def __init__(self, modules: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._containers: dict[int, Process] = {}
        self._started: list[Process] = []
        self._news = threading.Condition()
        self.ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, arguments: list[str], environment: dict[str, str], directory: Path, log: Path) -> Process:
        order = {"arguments": arguments, "environment": environment, "directory": str(directory), "log": str(log)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        with self._news:
            assert self._news.wait_for(lambda: self._started, 60), "no container was started"
            return self._started.pop()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            news = json.loads(line)
            with self._news:
                if "ready" in news:
                    self.ready.set()
                elif "code" in news:
                    self._containers.pop(news["pid"]).end(news["code"])
                else:
                    process = self._containers[news["pid"]] = Process(news["pid"])
                    self._started.append(process)
                self._news.notify_all()
        for process in self._containers.values():
            process.end(-signal.SIGKILL)


def main(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    say({"ready": True})
    orders = sys.stdin.buffer
    os.set_blocking(orders.fileno(), False)
    pending = b""
    while True:
        readable, _, _ = select.select([orders], [], [], 0.02)
        if readable:
            data = os.read(orders.fileno(), 1 << 20)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    run(order)
                say({"pid": pid})
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                say({"pid": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})


def say(news: dict[str, Any]) -> None:
    os.write(1, json.dumps(news).encode() + b"\n")


def run(order: dict[str, Any]) -> None:
    """Be a container."""
    os.setsid()
    os.chdir(order["directory"])
    os.environ.clear()
    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    code = 1
    try:
        from dagster._cli import main as dagster

        program, *sys.argv[1:] = order["arguments"]
        assert program == "dagster", f"{program}: not in this image"
        dagster()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as Python itself would end
        sys.excepthook(*sys.exc_info())
    finally:
        import atexit

        with suppress(BaseException):
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
