"""`lora-assets serve`: talk to a GGUF file, in the terminal and over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import ExportError
from lora_assets.cli.console import Json, err, plain_errors, print_json

if TYPE_CHECKING:
    from finetune.dataset.records import Message
    from finetune.export.runtime import GgufRuntime

_FORGET = "/new"


@plain_errors
def serve(
    gguf: Annotated[Path, typer.Option("--gguf", help="GGUF file of a model.")],
    lora: Annotated[Path | None, typer.Option(help="GGUF file of a LoRA adapter to put on top of it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; there is no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8080,
    context: Annotated[
        int | None, typer.Option(min=64, help="Tokens of a conversation; default: the model's own, at most 8192.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Chat here, or only serve.")] = True,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in the chat, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest word in the chat.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Serve a GGUF file: a chat in the terminal, a page for browsers and an OpenAI-compatible endpoint.

    Questions are read line by line from standard input, answers go to standard output, all else to standard
    error. The end of the input or Ctrl-C ends both. With --json the address is printed, and there is no chat.
    """
    from finetune.export.gguf_facts import read_gguf_facts
    from finetune.export.modelfile import MAX_CONTEXT
    from finetune.export.runtime import GgufRuntime

    own = read_gguf_facts(gguf)["context_length"] or MAX_CONTEXT
    with (
        suppress(KeyboardInterrupt),
        GgufRuntime(gguf, lora, context=context or min(own, MAX_CONTEXT), host=host, port=port, exact=False) as runtime,
    ):
        if as_json:
            print_json({"address": runtime.address, "endpoint": f"{runtime.address}/v1", "model": gguf.stem})
            sys.stdout.flush()
        else:
            _announce(runtime)
        if chat and not as_json:
            _chat(runtime, max_tokens=max_tokens, temperature=temperature)
        else:
            runtime.wait()


def _announce(runtime: GgufRuntime) -> None:
    url = runtime.address
    name = runtime.model.name
    err.print(f"{name} is served at {url} (a page for browsers; {url}/v1 speaks OpenAI's protocol):\n", markup=False)
    err.print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\", markup=False)
    err.print("""    -d '{"messages": [{"role": "user", "content": "Hello"}]}'\n""", markup=False)


def _chat(runtime: GgufRuntime, *, max_tokens: int, temperature: float) -> None:
    """Answer questions until there are no more; a conversation that got too long is begun anew."""
    err.print(f"Ask; {_FORGET} begins a new conversation, Ctrl-D ends.\n")
    messages: list[Message] = []
    for question in _questions():
        if question == _FORGET:
            messages.clear()
            continue
        messages.append({"role": "user", "content": question})
        answer = ""
        try:
            for piece in runtime.stream_chat(messages, max_tokens=max_tokens, temperature=temperature):
                sys.stdout.write(piece)
                sys.stdout.flush()
                answer += piece
        except ExportError as error:
            if not runtime.alive:
                raise
            err.print(f"{error.what}; a new conversation begins", style="red", markup=False)
            messages.clear()
            continue
        sys.stdout.write("\n")
        sys.stdout.flush()
        messages.append({"role": "assistant", "content": answer})


def _questions() -> Iterator[str]:
    """Lines that are not blank: edited at a prompt in a terminal, else as they come."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()
