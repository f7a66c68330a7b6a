"""One of several processes of a training, started by torchrun: ``python -m finetune.training.worker ADDRESS``."""

from __future__ import annotations

import sys

from finetune.errors import FinetuneError
from finetune.progress import ignore_progress
from finetune.training.processes import Worker


def main(address: str) -> int:
    """Train this process's share; the status is 1 if it failed, and the parent knows why."""
    import torch
    import torch.distributed as dist

    from finetune.training.attempt import train_share
    from finetune.training.ranks import agree_on_micro_batch, rank, wait_for_all

    worker = Worker(address)
    on_gpu = torch.cuda.is_available()
    try:
        if on_gpu:
            torch.cuda.set_device(dist.get_node_local_rank())
        dist.init_process_group("nccl" if on_gpu else "gloo")
        request = worker.request
        micro_batch = agree_on_micro_batch(f"{request.run_id} ({request.sharding})", worker.micro_batch)
        on_progress = worker.progress if rank() == 0 else ignore_progress
        train_share(request, micro_batch, on_progress=on_progress, still_mine=worker.still_mine)
        # Other nodes look for the adapter as soon as their processes have ended.
        wait_for_all()
    except (FinetuneError, FileExistsError) as error:
        worker.failed(error)
        return 1
    except torch.OutOfMemoryError as error:
        worker.failed(torch.OutOfMemoryError(str(error)))
        return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
