"""The processes of one training among themselves; a training of one process has rank 0 and nobody to ask."""

from __future__ import annotations

from finetune.errors import ConfigurationError


def rank() -> int:
    """This process's number; 0 is the one that writes and tells."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def agree(*flags: bool) -> tuple[bool, ...]:
    """Each flag as true everywhere if it is true anywhere: a step that one process saves or ends after, all do."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return flags
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


def agree_on_micro_batch(training: str, micro_batch: int) -> int:
    """The smallest of all processes' micro-batches: where memory ran out on one node, the others may not know yet.

    Raises:
        ConfigurationError: the processes were asked for different trainings.
    """
    import torch.distributed as dist

    asked: list[tuple[str, int]] = [("", 0)] * world_size()
    dist.all_gather_object(asked, (training, micro_batch))
    trainings = sorted({name for name, _ in asked})
    if len(trainings) > 1:
        raise ConfigurationError(
            f"the nodes were asked for different trainings: {', '.join(trainings)}",
            where="the plan, the dataset, the base model or TRAIN_SHARDING",
            remedy="Start every node with the same command, settings and files",
        )
    return min(size for _, size in asked)


def wait_for_all() -> None:
    """Go on when every process has come here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
