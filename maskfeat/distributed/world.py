"""Rank, world size and device of a process."""

import os
from collections.abc import Mapping
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
        The GPU with the number of the local rank, or the only one where Slurm shows each task one of its own; the CPU
        if `num_gpus` is 0 or there is no GPU.

    Raises:
        UserError: This machine has GPUs, but fewer than processes.
    """
    if num_gpus == 0 or torch.cuda.device_count() == 0:
        return torch.device("cpu")
    if torch.cuda.device_count() == 1 and slurm_shows_one_each():
        local_rank = 0
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own: start at most "
            f"{torch.cuda.device_count()} (torchrun --nproc_per_node, NUM_GPUS)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def slurm_shows_one_each(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether a task that sees one GPU has it for itself: --gpus-per-task=1 or --gpu-bind of srun."""
    per_task = env.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # "1", or with its kind "a100:1"
    on_node = env.get("SLURM_GPUS_ON_NODE", "")
    return "SLURM_STEP_ID" in env and (per_task == "1" or (on_node.isdecimal() and int(on_node) > 1))


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
