"""Whether this process is still the one that may train: what a training asks before it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.errors import TransientError

# False as soon as another process has taken the training over.
StillMine = Callable[[], bool]


def always_mine() -> bool:
    """For trainings that nobody else can know of."""
    return True


def refuse_if_taken_over(still_mine: StillMine, where: Path) -> None:
    """See that nobody has taken the training over, before a checkpoint or the adapter is written.

    Raises:
        TransientError: another process has.
    """
    if not still_mine():
        raise TransientError(
            "another process has taken this training over, so this one stops without writing anything",
            where=where,
            remedy="Nothing needs doing: the other one goes on from the last checkpoint",
        )
