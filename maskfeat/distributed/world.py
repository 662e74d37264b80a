"""Rank, world size and device of a process."""

import os
from dataclasses import dataclass

import torch

from maskfeat.errors import UserError


@dataclass(frozen=True)
class World:
    """Rank and world size of a process.

    Attributes:
        rank: Rank among all processes of the run.
        size: Number of processes of the run.
        local_rank: Rank among the processes of this machine.
        local_size: Number of processes of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0


def choose_device(num_gpus: int, local_rank: int) -> torch.device:
    """Return the device of a process and make it the current one.

    Args:
        num_gpus: NUM_GPUS of the config.
        local_rank: Rank among the processes of this machine.

    Returns:
        The GPU with the number of the local rank; the CPU if `num_gpus` is 0 or there is no GPU.

    Raises:
        UserError: This machine has GPUs, but fewer than processes.
    """
    if num_gpus == 0 or torch.cuda.device_count() == 0:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own: start at most "
            f"{torch.cuda.device_count()} (torchrun --nproc_per_node, NUM_GPUS)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
