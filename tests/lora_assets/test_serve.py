"""`lora-assets serve` on the embedded model: real processes, real HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.base_model.models import BaseModelRef
from finetune.export.converter import Conversions, ModelConversion

PROGRAM = str(Path(sys.executable).with_name("lora-assets"))
QUESTION = "What is an adapter?"


@pytest.fixture(scope="module")
def gguf(tiny_model: BaseModelRef, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny-F16.gguf"
    with Conversions([ModelConversion(tiny_model.path, path, "F16", {})]) as conversions:
        conversions.wait()
    return path


def start(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [PROGRAM, "serve", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
        # As in a terminal, where Ctrl-C reaches the whole group of processes.
        start_new_session=True,
        **options,
    )


@pytest.fixture(scope="module")
def served(gguf: Path) -> Iterator[tuple["subprocess.Popen[str]", dict[str, str]]]:
    """A server without a chat, and what it printed."""
    process = start("--gguf", str(gguf), "--port", "0", "--json")
    assert process.stdout is not None
    text = ""
    while not text.endswith("}\n"):
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        text += line
    yield process, json.loads(text)
    if process.poll() is None:
        process.kill()
    process.communicate()


Served = tuple["subprocess.Popen[str]", dict[str, str]]


def ask(served: Served, **changes: Any) -> httpx.Response:
    body = {
        "model": "tiny-F16",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 24,
    }
    url = f"{served[1]['endpoint']}/chat/completions"
    return httpx.post(url, json=body | changes, timeout=180, trust_env=False)


def answer_of(served: Served) -> str:
    answer = ask(served).json()
    assert answer["object"] == "chat.completion"
    return str(answer["choices"][0]["message"]["content"])


def test_the_endpoint_speaks_openais_protocol(served: Served) -> None:
    models = httpx.get(f"{served[1]['endpoint']}/models", trust_env=False).json()
    assert [model["id"] for model in models["data"]] == ["tiny-F16"]
    whole = answer_of(served)
    assert whole
    streamed = ask(served, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert len(pieces) > 2
    assert "".join(pieces) == whole


def test_a_browser_finds_a_page(served: Served) -> None:
    page = httpx.get(served[1]["address"], trust_env=False)
    assert page.headers["content-type"].startswith("text/html")


def test_the_terminal_answers_what_is_piped_in_as_the_endpoint_does(gguf: Path, served: Served) -> None:
    process = start("--gguf", str(gguf), "--port", "0", "--max-tokens", "24")
    out, err = process.communicate(f"{QUESTION}\n\n/new\n{QUESTION}\n", timeout=120)
    assert process.returncode == 0, err
    assert out == 2 * f"{answer_of(served)}\n"
    assert "curl http://127.0.0.1:" in err
    assert "Traceback" not in err


def test_a_conversation_that_no_longer_fits_is_begun_anew(gguf: Path) -> None:
    process = start("--gguf", str(gguf), "--port", "0", "--context", "256", "--max-tokens", "8")
    out, err = process.communicate(f"{'word ' * 400}\n{QUESTION}\n", timeout=120)
    assert process.returncode == 0, err
    assert "exceed" in err
    assert "a new conversation begins" in err
    assert len(out.splitlines()) == 1


def test_a_port_that_is_taken_is_a_clear_error(gguf: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("--gguf", str(gguf), "--port", str(port))
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert "cannot listen there: Address already in use" in err
    assert f"[127.0.0.1:{port}]. Choose another port" in err
    assert "Traceback" not in err


def test_a_file_that_is_no_gguf_is_a_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"safetensors")
    process = start("--gguf", str(file))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "not a whole GGUF file" in err
    assert "Traceback" not in err


def test_ctrl_c_ends_the_server_and_its_child(served: Served) -> None:
    process, told = served
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    with pytest.raises(httpx.ConnectError):
        httpx.get(told["address"], trust_env=False)
