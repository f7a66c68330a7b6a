from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
from pathlib import Path

import pytest

from finetune.hashed_file import PIECE, HashedFile


def test_appended_bytes_of_any_length_arrive_in_order_and_hashed(tmp_path: Path) -> None:
    chance = random.Random(0)
    parts = [chance.randbytes(size) for size in (0, 1, 5000, PIECE - 1, PIECE, 3 * PIECE + 7, 2, 0, PIECE // 2)]

    with HashedFile(tmp_path / "file") as file:
        for part in parts:
            file.append(part)

    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert file.sha256 == hashlib.sha256(b"".join(parts)).hexdigest()


def test_filled_buffers_are_written_as_far_as_they_were_filled(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "file") as file:
        for number in range(10):
            buffer = file.buffer()
            buffer[:3] = b"%03d" % number
            file.write(buffer[:3])

    assert (tmp_path / "file").read_bytes() == b"000001002003004005006007008009"
    assert file.sha256 == hashlib.sha256(b"000001002003004005006007008009").hexdigest()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("size", [10, 20 * PIECE])
def test_a_full_disk_is_told_at_the_latest_when_the_file_is_closed(size: int) -> None:
    with pytest.raises(OSError, match="No space left"), HashedFile(Path("/dev/full")) as file:
        file.append(bytes(size))


def test_what_was_gathered_is_not_written_after_an_error_of_the_caller(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), HashedFile(tmp_path / "file") as file:
        file.append(b"gathered")
        raise RuntimeError

    assert (tmp_path / "file").read_bytes() == b""


def test_what_is_on_the_disk_is_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PIECE))
    if subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True).stdout.strip() == "tmpfs":
        pytest.skip("a file on this disk is nowhere but in memory")

    def in_memory() -> bool:
        with path.open("rb", buffering=0) as stream:
            try:
                return os.preadv(stream.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                return False

    assert in_memory()
    with HashedFile(path) as file:
        for _ in range(500):
            file.append(bytes(PIECE))
            if path.stat().st_size > 16 * PIECE and not in_memory():
                return
    pytest.fail("500 MB are in memory")
