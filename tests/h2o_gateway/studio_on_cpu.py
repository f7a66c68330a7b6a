"""H2O LLM Studio's own ``train.py`` on a machine without a GPU and without its environment.

As a gateway's training command, started in a checkout of H2O LLM Studio (1.14.9 was tried):

    H2O_GATEWAY_STUDIO_DIR=<checkout> H2O_GATEWAY_STUDIO_WORKERS=0 \
    H2O_GATEWAY_TRAIN_COMMAND="$PWD/.venv/bin/python $PWD/tests/h2o_gateway/studio_on_cpu.py -Y {config}" \
    make h2o-gateway

It runs with this project's versions of PyTorch, transformers and peft. Packages that are not installed
and that a training on one device never calls are replaced by empty ones, and one GPU is claimed, which
H2O LLM Studio asks for before it turns to the CPU by itself.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

UNUSED = {"GPUtil", "coolname", "deepspeed", "neptune", "openai", "sacrebleu", "toml", "wandb"}


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self) -> None:
        self.absent = {name for name in UNUSED if importlib.util.find_spec(name) is None}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.absent:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> MagicMock:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


if __name__ == "__main__":
    import torch

    sys.meta_path.append(EmptyModules())
    if not torch.cuda.is_available():
        torch.cuda.device_count = lambda: 1
    script = Path("llm_studio/train.py").absolute()
    sys.path.insert(0, str(script.parents[1]))
    runpy.run_path(str(script), run_name="__main__")
