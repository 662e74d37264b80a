"""Processes: who they are, the group that they join, and the few collectives that the program needs.

A set-up that fails raises; nothing falls back in silence. How processes start stands in launch.py.
"""

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


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


def join(world: World, backend: str, device: torch.device, init_method: str = "env://") -> None:
    """Join the process group; gloo on the CPU whatever the backend asked for."""
    if world.size == 1:
        return
    dist.init_process_group(
        backend if device.type == "cuda" else "gloo",
        init_method=init_method,
        rank=world.rank,
        world_size=world.size,
        device_id=device if device.type == "cuda" else None,
    )


def leave() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def number_of_ranks() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """`value` summed over all ranks, in place where there are several."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather_from_ranks(value: Any) -> list[Any]:
    """One plain value of every rank, in the order of ranks. Not for the training loop: it waits for all."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_rank(value: Tensor) -> None:
    """Overwrite `value` with that of rank 0."""
    if dist.is_initialized():
        dist.broadcast(value, src=0)


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def seed_draws(*key: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices) by a key such as (seed, step, rank).

    Called at every step, so that a resumed run draws what an uninterrupted one draws.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
