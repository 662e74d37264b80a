"""The rank of this process, and its device."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class World:
    """Where a process stands: its rank of `size`, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(num_gpus: int, local_rank: int) -> torch.device:
    """The device of a process: the GPU of its local rank, or the CPU for NUM_GPUS 0 and where there is no GPU."""
    if num_gpus == 0 or torch.cuda.device_count() == 0:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no GPU of its own: start at most "
            f"{torch.cuda.device_count()} (torchrun --nproc_per_node, NUM_GPUS)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
