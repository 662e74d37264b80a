"""The process group and the few collectives that the program needs.

A set-up that fails raises; nothing falls back silently.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store

from maskfeat.distributed.world import World

T = TypeVar("T")


_cpu_group: Any = None


def init_process_group(
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


def new_cpu_group() -> Any:
    """A group of all ranks on the CPU for collectives of a thread of its own; None where there is one process."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def destroy_process_group() -> None:
    """Leave the process group, where there is one."""
    global _cpu_group
    _cpu_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def is_collective_error(error: Exception) -> bool:
    """Whether a collective failed, as it does when another process is gone, rather than the work of this one."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def world_size() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """`value` summed over all ranks, in place where there are several."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_gather_object(value: Any) -> list[Any]:
    """One plain value of every rank, in the order of ranks. Not for the training loop: it waits for all."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_cpu_group)
    return values


def run_on_main(job: Callable[[], T]) -> T:
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


class FlagExchange:
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


def broadcast_from_main(value: Tensor) -> None:
    """Overwrite `value` with that of rank 0."""
    if dist.is_initialized():
        dist.broadcast(value, src=0)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, from which checkpoints are written.

    Between two steps the running statistics of batch norms differ from rank to rank; evaluation must not.
    """
    for buffer in module.buffers():
        broadcast_from_main(buffer)
