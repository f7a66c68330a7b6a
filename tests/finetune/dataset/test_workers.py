from __future__ import annotations

import threading
from pathlib import Path

from finetune.dataset.reading import fingerprint_file
from finetune.dataset.scan import DEFAULT_LIMITS, RangeTask
from finetune.dataset.workers import scanning

BLOCK = 1 << 17


def test_answers_larger_than_a_pipe_come_in_the_order_of_their_tasks(tmp_path: Path) -> None:
    """Nobody waits for another who waits: the parent reads late, and both have more to say than a pipe holds."""
    path = tmp_path / "short.jsonl"
    path.write_bytes(b"".join(b'{"text":"%d"}\n' % number for number in range(200_000)))
    status = path.stat()
    content = fingerprint_file(path, size=status.st_size, mtime_ns=status.st_mtime_ns, block_bytes=BLOCK)
    tasks = [
        RangeTask(path, status.st_size, start, min(start + BLOCK, status.st_size), block, DEFAULT_LIMITS)
        for start, block in zip(range(0, status.st_size, BLOCK), content.blocks, strict=True)
    ]
    with scanning(1) as scan:
        expected = list(scan(tasks))
    assert min(len(found.records) for found in expected[:-1]) > 1 << 16
    with scanning(2) as scan:
        results = scan(tasks)
        first = next(results)
        threading.Event().wait(0.3)
        assert [first, *results] == expected


def test_those_who_have_seen_enough_are_not_kept_waiting(tmp_path: Path) -> None:
    path = tmp_path / "export.jsonl"
    path.write_bytes(b'{"text":"one"}\n' * 50_000)
    status = path.stat()
    content = fingerprint_file(path, size=status.st_size, mtime_ns=status.st_mtime_ns, block_bytes=status.st_size)
    task = RangeTask(path, status.st_size, 0, status.st_size, content.blocks[0], DEFAULT_LIMITS)
    with scanning(2) as scan:
        assert next(scan([task] * 20)).lines == 50_000
