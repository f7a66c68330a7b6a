"""What a training takes of the machine's memory, and what it was too little for."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from finetune.publishing import write_json_atomically

_RECORD = "out_of_memory.json"


def too_large_micro_batches(work_dir: Path) -> list[int]:
    """The micro-batches with which earlier attempts of a training ran out of memory, in turn."""
    record = work_dir / _RECORD
    return [int(size) for size in json.loads(record.read_bytes())] if record.exists() else []


def note_out_of_memory(work_dir: Path, micro_batch: int) -> None:
    """Keep for later attempts, those of other nodes too, that a micro-batch was too large."""
    write_json_atomically(work_dir / _RECORD, [*too_large_micro_batches(work_dir), micro_batch])


def peak_memory_gb() -> float:
    """Peak memory in GB (10^9 bytes): what the GPU must have where there is one, else this process's resident set.

    That is the most that PyTorch's allocator held, and what the GPU holds beside it: the CUDA context.
    """
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        beside = total - free - torch.cuda.memory_reserved()
        return float(torch.cuda.max_memory_reserved() + beside) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
