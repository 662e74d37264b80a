"""Processes: who they are, how they start, and the few collectives that the program needs.

torchrun and `torch.multiprocessing` are the engines. A set-up that fails raises; nothing falls back in silence.
"""

import logging
import os
import random
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")


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


def torchrun_world() -> World | None:
    """The world that torchrun describes in the environment; None where it did not start this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if any(name not in os.environ for name in names):
        return None
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return World(rank, size, local_rank, local_size)


def check_devices(num_gpus: int, backend: str) -> None:
    """See that this machine has the GPUs that are asked for.

    Several CPU processes are had by NUM_GPUS > 1 with DIST_BACKEND gloo on a machine without a GPU.

    Raises:
        ValueError: where it has fewer.
    """
    available = torch.cuda.device_count()
    if num_gpus <= available or (available == 0 and num_gpus > 1 and backend == "gloo"):
        return
    hint = " to run on the CPU" if available == 0 else ""
    raise ValueError(
        f"NUM_GPUS is {num_gpus}, but this machine shows {available} CUDA device(s): set NUM_GPUS {available}{hint}"
    )


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


_cpu_group: Any = None


def join(
    world: World,
    backend: str,
    device: torch.device,
    init_method: str = "env://",
    timeout: timedelta = timedelta(minutes=30),
) -> Store | None:
    """Join the process group; gloo on the CPU whatever the backend asked for.

    Args:
        timeout: of collectives.

    Returns:
        the store that all processes reach, for small messages; None where there is only one process.
    """
    global _cpu_group
    if world.size == 1:
        return None
    store, _, _ = next(dist.rendezvous(init_method, world.rank, world.size, timeout=timeout))
    dist.init_process_group(
        backend if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("run", store),
        rank=world.rank,
        world_size=world.size,
        device_id=device if device.type == "cuda" else None,
        timeout=timeout,
    )
    # Apart from the other collectives, which may be those of a GPU, and which it may overtake.
    _cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    return dist.PrefixStore("messages", store)


def leave() -> None:
    """Leave the process group, where there is one."""
    global _cpu_group
    _cpu_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def free_address() -> str:
    """A tcp:// address on this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _spawned(local_rank: int, job: Callable[..., int], plan: World, init_method: str, args: tuple[Any, ...]) -> None:
    world = World(plan.rank + local_rank, plan.size, local_rank, plan.local_size)
    if "OMP_NUM_THREADS" not in os.environ:
        # As torchrun does: processes that take one another's cores spend their time in waiting for threads.
        torch.set_num_threads(max(available_cores() // plan.local_size, 1))
    code = job(world, init_method, *args)
    if code:
        sys.exit(code)  # the parent ends the other processes


def launch(
    job: Callable[..., int],
    args: tuple[Any, ...],
    *,
    processes: int,
    num_shards: int = 1,
    shard_id: int = 0,
    init_method: str = "",
) -> int:
    """Run `job(world, init_method, *args)` in every process of this machine, and wait; the exit code.

    Under torchrun this process is one of them. Otherwise `processes` are spawned where there are several in all, and
    `init_method` is where the machines meet (one machine finds an address by itself).
    """
    world = torchrun_world()
    if world is not None:
        machines = world.size // world.local_size
        if machines != num_shards:
            raise ValueError(
                f"torchrun started {machines} machine(s), but NUM_SHARDS is {num_shards}: set NUM_SHARDS {machines} "
                "(learning rates scale by it, see SOLVER.BASE_LR_SCALE_NUM_SHARDS)"
            )
        return job(world, "env://", *args)
    size = processes * num_shards
    if size == 1:
        return job(World(), "", *args)
    if num_shards > 1 and not init_method:
        raise ValueError(f"NUM_SHARDS is {num_shards}: give --init_method tcp://HOST:PORT of the first machine")
    plan = World(shard_id * processes, size, 0, processes)
    try:
        mp.spawn(_spawned, (job, plan, init_method or free_address(), args), nprocs=processes)
    except mp.ProcessExitedException as error:
        logger.error("process %d of this machine ended with code %s", error.error_index, error.exit_code)
        return error.exit_code or 1
    return 0


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
    dist.all_gather_object(values, value, group=_cpu_group)
    return values


def on_first_rank(job: Callable[[], T]) -> T:
    """What `job` returns on rank 0, where alone it runs, on every rank; its ValueErrors and OSErrors as well."""
    if not dist.is_initialized():
        return job()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [job(), None]
        except (ValueError, OSError) as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome, src=0, group=_cpu_group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class Agreement:
    """Flags that one rank or another raises, made known to all of them between steps, without waiting for the device.

    Each exchange returns what was raised up to the one before it, the same on every rank: the messages of a step travel
    while the next one is computed. A process that is alone learns its own flags at once.
    """

    def __init__(self) -> None:
        self._sent: tuple[Any, Tensor] | None = None

    def exchange(self, *flags: bool) -> Sequence[bool]:
        """Hand in this rank's flags, after every step. Always as many."""
        if not dist.is_initialized():
            return flags
        values = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_cpu_group, async_op=True)
        before, self._sent = self._sent, (work, values)
        if before is None:
            return [False] * len(flags)
        before[0].wait()
        return before[1].bool().tolist()


def from_first_rank(value: Tensor) -> None:
    """Overwrite `value` with that of rank 0."""
    if dist.is_initialized():
        dist.broadcast(value, src=0)


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier(group=_cpu_group)


def seed_draws(*key: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices) by a key such as (seed, step, rank).

    Called at every step, so that a resumed run draws what an uninterrupted one draws.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
