"""What a training takes of the machine's memory."""

from __future__ import annotations

import resource
import sys


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
