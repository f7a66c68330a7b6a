"""Runs llama.cpp's conversion scripts in a process of their own.

Started by path, with ``-P``, by `finetune.export.converter`; never imported. The first line of
standard input is a JSON object::

    {"llama_cpp": directory of llama.cpp's scripts, "threads": how many, "jobs": [job, ...]}
    job = {"script": "convert_hf_to_gguf.py" or "convert_lora_to_gguf.py", "model": directory, "arguments": [...]}

The scripts run one after another, so that torch and transformers are imported once. A line
``{"done": n}`` follows each on the original standard output; what the scripts print goes to standard
error. The first failure ends the process with a line
``{"error": message, "errno": number or null}``.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What tokenizers' ByteLevel does without a regular expression of the model's own is GPT-2's.
_GPT2_PRE_TOKENIZER = "gpt-2"
_PR_SET_PDEATHSIG = 1


def plain_byte_level(tokenizer_json: Path) -> bool:
    """Whether a tokenizer splits text exactly as GPT-2's does, whatever its vocabulary."""
    spec = json.loads(tokenizer_json.read_bytes())
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    return (
        spec["model"]["type"] == "BPE"
        and not spec["model"].get("ignore_merges")
        and spec.get("normalizer") is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space", False)
    )


def _accept_plain_byte_level(model_directory: list[Path]) -> None:
    """llama.cpp knows pre-tokenizers by a hash that depends on the vocabulary: name ours for it."""
    base = importlib.import_module("conversion.base")
    recognise = base.TextModel.get_vocab_base_pre

    def recognise_or_gpt2(self: Any, tokenizer: Any) -> str:
        try:
            return str(recognise(self, tokenizer))
        except NotImplementedError:
            path = model_directory[0] / "tokenizer.json"
            if path.is_file() and plain_byte_level(path):
                return _GPT2_PRE_TOKENIZER
            raise NotImplementedError(
                "llama.cpp does not know this tokenizer's pre-tokenizer, and it is not GPT-2's byte-level one"
            ) from None

    base.TextModel.get_vocab_base_pre = recognise_or_gpt2


def _remember_tensor(current: list[str]) -> None:
    """Keep `current` the name of the tensor in hand: errors of llama.cpp's converter do not tell it."""
    base = importlib.import_module("conversion.base")
    original = base.ModelBase.get_tensors

    def named(self: Any) -> Iterator[tuple[str, Any]]:
        for name, tensor in original(self):
            current[:] = [name]
            yield name, tensor
        current.clear()

    base.ModelBase.get_tensors = named


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: nobody would take what it writes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Do the jobs that standard input asks for; the exit code is 0 if all went well."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    os.environ["OMP_NUM_THREADS"] = str(request["threads"])
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    scripts = Path(request["llama_cpp"])
    # Its own gguf comes before the package index's: the two must fit each other.
    sys.path[:0] = [str(scripts), str(scripts / "gguf-py")]
    model_directory = [Path()]
    _accept_plain_byte_level(model_directory)
    tensor: list[str] = []
    _remember_tensor(tensor)
    for number, job in enumerate(request["jobs"], 1):
        model_directory[0] = Path(job["model"])
        sys.argv = [job["script"], *job["arguments"]]
        try:
            runpy.run_path(str(scripts / job["script"]), run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                answers.write(json.dumps({"error": f"{job['script']} ended with {stop.code}"}) + "\n")
                answers.flush()
                return 1
        except Exception as error:
            number_of_error = error.errno if isinstance(error, OSError) else None
            place = f" at the tensor {tensor[0]}" if tensor else ""
            message = f"{type(error).__name__}{place}: {error}"
            answers.write(json.dumps({"error": message, "errno": number_of_error}) + "\n")
            answers.flush()
            raise
        answers.write(json.dumps({"done": number}) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
