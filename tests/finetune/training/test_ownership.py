from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from finetune.errors import ConfigurationError, TransientError
from finetune.training.ownership import hold_output


def test_an_output_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with hold_output(tmp_path / "adapter"):
        taken = pytest.raises(TransientError, match=r"process \d+ on .* trains into this directory already")
        with taken, hold_output(tmp_path / "adapter"):
            pass
        with hold_output(tmp_path / "another"):
            pass
    with hold_output(tmp_path / "adapter"):
        pass


def test_a_volume_without_locks_is_refused_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_locks(stream: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    refused = pytest.raises(ConfigurationError, match=r"no lock can be had here.*No locks available.*NFS 4")
    with refused, hold_output(tmp_path / "adapter"):
        pass
