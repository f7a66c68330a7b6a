"""What is otherwise here than where a training ran, and whether its adapter must come out to the bit all the same."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from finetune.reproduction.models import TrainingEntry
from finetune.reproduction.provenance import Provenance
from finetune.training.identity import CODE_VERSION

# Libraries that have no say in what is computed.
_BYSTANDERS = {"dagster", "optuna", "lora-assets"}


class Difference(BaseModel):
    """Something that is otherwise here; `decides` where another adapter may come of it, if only in its last bits."""

    model_config = ConfigDict(frozen=True)

    what: str
    recorded: str
    here: str
    decides: bool


def differences(entry: TrainingEntry, here: Provenance) -> list[Difference]:
    """In what this machine and its libraries differ from those of a training.

    Threads are not compared: a training that is run again takes as many as the first time.
    """
    then = entry.provenance
    if then is None:
        return [_difference("circumstances", "unknown", "known", decides=True)]
    pairs: list[tuple[str, object, object, bool]] = [
        (name, then.libraries.get(name), here.libraries.get(name), name not in _BYSTANDERS)
        for name in sorted({*then.libraries, *here.libraries})
    ]
    pairs += [
        ("Python", then.python, here.python, False),
        ("operating system", then.platform, here.platform, False),
        ("machine", then.hardware.machine, here.hardware.machine, True),
        ("CPU", then.hardware.cpu_model, here.hardware.cpu_model, True),
        ("GPUs", _listed(then.hardware.gpus), _listed(here.hardware.gpus), True),
        ("GPU driver", then.hardware.gpu_driver, here.hardware.gpu_driver, True),
        ("git commit", then.git_commit, here.git_commit, False),
        ("changed since the commit", then.git_dirty, here.git_dirty, False),
        ("version of the training code", entry.code_version, CODE_VERSION, True),
    ]
    return [_difference(what, a, b, decides=decides) for what, a, b, decides in pairs if a != b]


def must_be_identical(entry: TrainingEntry, found: Sequence[Difference]) -> bool:
    """Whether the same bits must come out: on a CPU, with equal libraries, and nothing else that decides."""
    return entry.result.device == "cpu" and not any(difference.decides for difference in found)


def _difference(what: str, recorded: object, here: object, *, decides: bool) -> Difference:
    return Difference(what=what, recorded=_shown(recorded), here=_shown(here), decides=decides)


def _shown(value: object) -> str:
    return "none" if value in (None, "") else str(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
