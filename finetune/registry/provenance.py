"""Under what an adapter was made: libraries, hardware, code, command; never the environment's values."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from finetune.registry.models import Hardware, Provenance

_LIBRARIES = (
    "lora-assets",
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "numpy",
    "dagster",
)
_SECRET_FLAG = re.compile(r"^--?[\w-]*(key|token|secret|password)[\w-]*", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_MASK = "***"


def describe_process() -> Provenance:
    """What this process runs on and with."""
    return Provenance(
        libraries=_libraries(),
        python=platform.python_version(),
        platform=platform.platform(),
        hardware=_hardware(),
        git_commit=_git_commit(Path(__file__)),
        command=masked_command(sys.argv),
    )


def masked_command(arguments: list[str]) -> list[str]:
    """A command line without the values of flags that name secrets, and without credentials in addresses."""
    shown: list[str] = []
    hide = False
    for argument in arguments:
        flag = _SECRET_FLAG.match(argument)
        if hide:
            shown.append(_MASK)
        elif flag and "=" in argument:
            shown.append(f"{argument.split('=', 1)[0]}={_MASK}")
        else:
            shown.append(_CREDENTIALS.sub(f"{_MASK}@", argument))
        hide = not hide and flag is not None and "=" not in argument
    return shown


def _libraries() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> Hardware:
    gpus: list[str] = []
    # Only a process that trained has torch at hand; importing it for this alone would cost seconds.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Hardware(
        machine=platform.machine(),
        cpus=os.cpu_count(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=gpus,
    )


def _git_commit(source: Path) -> str | None:
    """The commit of the repository that tracks `source`; None for an installed package."""
    try:
        for command in (["ls-files", "--error-unmatch", source.name], ["rev-parse", "HEAD"]):
            done = subprocess.run(
                ["git", "-C", str(source.parent), *command], capture_output=True, text=True, timeout=10, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
