"""A llama.cpp runtime for one GGUF file."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx

from finetune.errors import ConfigurationError, ExportError

if TYPE_CHECKING:
    from finetune.dataset.records import Message

_WORKER = Path(__file__).with_name("runtime_worker.py")
_LOAD_TIMEOUT = 600
_ANSWER_TIMEOUT = 600
_ONE_THREAD_BELOW = 200 * 2**20
_REMEDY = "Delete the gguf directory and materialize the asset again"


def _threads(model: Path) -> int:
    # Threads of ggml meet by spinning: on a busy machine two of them take ten times as long as one over a small model.
    small = model.is_file() and model.stat().st_size < _ONE_THREAD_BELOW
    return 1 if small else os.cpu_count() or 1


def _refuse_taken_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen there: {error.strerror}", where=f"{host}:{port}", remedy="Choose another port, or 0 for any"
        ) from error


class GgufRuntime:
    """Loads a GGUF file, optionally with a GGUF LoRA adapter, and answers greedily.

    llama.cpp runs in a child process: a damaged file makes it abort, which must not take the caller
    along. By default it listens on the loopback interface only. It ends with the block, or with its parent.

    Args:
        model: the GGUF file.
        adapter: a GGUF LoRA adapter to put on top of it.
        context: room for prompt and answer, in tokens.
        host: address to listen on.
        port: port to listen on, 0 for any.
        exact: compute with the precision that comparisons need; else as servers do, with llama.cpp's page for
            browsers.

    Attributes:
        address: the server's URL, within the block.
    """

    address: str

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        *,
        context: int = 2048,
        host: str = "127.0.0.1",
        port: int = 0,
        exact: bool = True,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self._host, self._port = host, port
        self._request = {
            "model": str(model),
            "adapter": str(adapter) if adapter else None,
            "context": context,
            "threads": _threads(model),
            "host": host,
            "port": port,
            "exact": exact,
        }

    def __enter__(self) -> GgufRuntime:
        """Start the child process and load the files.

        Raises:
            ConfigurationError: xllamacpp is not installed, or the port is taken.
            ExportError: the runtime cannot load the model or the adapter.
        """
        if importlib.util.find_spec("xllamacpp") is None:
            raise ConfigurationError(
                "the llama.cpp runtime is not installed",
                where="xllamacpp",
                remedy="Install the training extra: pip install 'lora-assets[train]'",
            )
        for path in filter(None, (self.model, self.adapter)):
            if not path.is_file():
                raise ExportError("no GGUF file here", where=path, remedy=_REMEDY)
        if self._port:
            _refuse_taken_port(self._host, self._port)
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.address = self._start()
            self._client = httpx.Client(base_url=self.address, timeout=_ANSWER_TIMEOUT, trust_env=False)
        except BaseException:
            self._end()
            raise
        return self

    def _start(self) -> str:
        assert self._process.stdin is not None  # noqa: S101 - stdin=PIPE
        assert self._process.stdout is not None  # noqa: S101 - stdout=PIPE
        watchdog = threading.Timer(_LOAD_TIMEOUT, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps(self._request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        answer = json.loads(line) if line else {}
        if "address" in answer:
            return str(answer["address"])
        raise self._failure("llama.cpp cannot load the file")

    @property
    def alive(self) -> bool:
        """Whether llama.cpp still runs."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Serve until llama.cpp ends by itself.

        Raises:
            ExportError: it ended.
        """
        self._process.wait()
        raise self._failure("llama.cpp ended")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()
        self._end()

    def _end(self) -> None:
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._log.close()

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text; names of special tokens in it become those tokens.

        With `add_special`, BOS and EOS are added where the file's metadata ask for them.
        """
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return [int(token) for token in self._post("/tokenize", body)["tokens"]]

    def complete(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """At most `max_tokens` most likely next tokens after the prompt `ids`."""
        body = {"prompt": list(ids), "n_predict": max_tokens, "temperature": 0, "top_k": 1}
        answer = self._post("/completion", body | {"return_tokens": True, "cache_prompt": False})
        return [int(token) for token in answer["tokens"]]

    def complete_with_distributions(
        self, ids: Sequence[int], max_tokens: int, top: int
    ) -> tuple[list[int], list[tuple[int, dict[int, float]]]]:
        """As `complete`, with the log-probabilities of the `top` likeliest tokens, by id, behind each token.

        llama.cpp's server leaves out tokens after which the text ends within a UTF-8 character, so
        every distribution comes with the token that was chosen from it.
        """
        body = {"prompt": list(ids), "n_predict": max_tokens, "temperature": 0, "top_k": 1, "n_probs": top}
        answer = self._post("/completion", body | {"return_tokens": True, "cache_prompt": False})
        chosen = [
            (int(step["id"]), {int(entry["id"]): float(entry["logprob"]) for entry in step["top_logprobs"]})
            for step in answer.get("completion_probabilities", [])
        ]
        return [int(token) for token in answer["tokens"]], chosen

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that the GGUF file's own chat template makes of a conversation."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def chat(self, messages: Sequence[Message], max_tokens: int = 64) -> str:
        """The greedy answer to a conversation, through the chat template in the GGUF file."""
        body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0, "top_k": 1}
        answer = self._post("/v1/chat/completions", body | {"cache_prompt": False})
        return str(answer["choices"][0]["message"]["content"] or "")

    def stream_chat(self, messages: Sequence[Message], *, max_tokens: int, temperature: float) -> Iterator[str]:
        """The answer to a conversation, piece by piece, through the chat template in the GGUF file.

        Raises:
            ExportError: the conversation does not fit the context, or llama.cpp died.
        """
        body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": temperature, "stream": True}
        path = "/v1/chat/completions"
        try:
            with self._client.stream("POST", path, json=body) as response:
                if response.is_error:
                    response.read()
                response.raise_for_status()
                # Server-sent events: "data: {...}" lines, the last one "data: [DONE]".
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise ExportError(f"llama.cpp breaks off: {event['error']}", where=self.model)
                        for choice in event.get("choices", []):
                            yield choice["delta"].get("content") or ""
        except httpx.HTTPStatusError as error:
            raise self._refusal(path, error.response) from error
        except httpx.TransportError as error:
            raise self._failure(f"llama.cpp died while answering ({error})") from error

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            response = self._client.post(path, json=body)
            response.raise_for_status()
            return response.json()
        except httpx.HTTPStatusError as error:
            raise self._refusal(path, error.response) from error
        except httpx.TransportError as error:
            raise self._failure(f"llama.cpp died while answering ({error})") from error

    def _refusal(self, path: str, response: httpx.Response) -> ExportError:
        return ExportError(f"llama.cpp refuses {path}: {response.text[:300]}", where=self.model, remedy=_REMEDY)

    def _failure(self, what: str) -> ExportError:
        self._log.seek(0)
        # llama.cpp's log lines read "0.00.005.557 E cmn  message".
        said = re.findall(r"^[\d.]+ E \S*\s+(.*)$", self._log.read(), re.MULTILINE)
        detail = f": {'; '.join(said[:2])}" if said else ""
        return ExportError(f"{what}{detail}", where=self.adapter or self.model, remedy=_REMEDY)
