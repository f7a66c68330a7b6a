"""Under what something was made: libraries, hardware, code, command; never the environment's values."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from finetune.redaction import Redactor

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
    "optuna",
    "dagster",
)
_SECRET_FLAG = re.compile(r"^--?[\w-]*(key|token|secret|passw|credential)[\w-]*", re.IGNORECASE)
_MASK = "***"
_SECONDS = 10


class Hardware(BaseModel):
    """A machine: its logical `cpus`, memory in bytes, its GPUs by name with their driver's version."""

    model_config = ConfigDict(frozen=True)

    machine: str
    cpus: int | None
    memory_bytes: int
    gpus: list[str]
    cpu_model: str | None = None
    gpu_driver: str | None = None


class Provenance(BaseModel):
    """Under what a process ran: `command` has its secrets masked, the environment is left out.

    `threads` is how many PyTorch computed with on the CPU, where it was loaded: sums in another order differ in
    their last bits.
    """

    model_config = ConfigDict(frozen=True)

    libraries: dict[str, str]
    python: str
    platform: str
    hardware: Hardware
    threads: int | None = None
    # of the project's own repository, and whether tracked files differed from it; None for an installed package
    git_commit: str | None
    git_dirty: bool | None = None
    command: list[str]


def describe_process() -> Provenance:
    """What this process runs on and with."""
    commit, dirty = _git(Path(__file__).parent)
    # Only a process that trained has torch at hand; importing it for this alone would cost seconds.
    torch = sys.modules.get("torch")
    return Provenance(
        libraries=_libraries(),
        python=platform.python_version(),
        platform=platform.platform(),
        hardware=_hardware(),
        threads=None if torch is None else torch.get_num_threads(),
        git_commit=commit,
        git_dirty=dirty,
        command=masked_command(sys.argv),
    )


def masked_command(arguments: list[str]) -> list[str]:
    """A command line without the values of flags that name secrets, and without what has the form of one."""
    redact = Redactor()
    shown: list[str] = []
    hide = False
    for argument in arguments:
        flag = _SECRET_FLAG.match(argument)
        if hide:
            shown.append(_MASK)
        elif flag and "=" in argument:
            shown.append(f"{argument.split('=', 1)[0]}={_MASK}")
        else:
            shown.append(redact(argument))
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
    gpus = [line.rpartition(", ") for line in _nvidia_smi()]
    return Hardware(
        machine=platform.machine(),
        cpus=os.cpu_count(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=[name for name, _, _ in gpus],
        cpu_model=_cpu_model(),
        gpu_driver=gpus[0][2] if gpus else None,
    )


def _nvidia_smi() -> list[str]:
    """``name, driver`` of each GPU; it needs no torch, and is there wherever a GPU can be used."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    return _output([program, "--query-gpu=name,driver_version", "--format=csv,noheader"]).splitlines()


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or None


def _git(directory: Path) -> tuple[str | None, bool | None]:
    """The commit of the repository that tracks a directory, and whether it was changed since; None for a package."""
    # Without the locks that would stand in the way of somebody's commit.
    git = ["git", "--no-optional-locks", "-C", str(directory)]
    if not _output([*git, "ls-files", "--error-unmatch", "__init__.py"]):
        return None, None
    commit = _output([*git, "rev-parse", "HEAD"]).strip()
    return commit or None, bool(_output([*git, "status", "--porcelain", "--untracked-files=no"]))


def _output(command: list[str]) -> str:
    """What a program prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
