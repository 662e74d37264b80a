"""The process group and the collectives used by the program; they do nothing in a run of a single process.

Errors during initialization are raised: there is no silent fallback to fewer processes or another backend.
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
    """Initialize the process group.

    Args:
        world: Rank and world size of this process.
        backend: Backend for CUDA devices; the CPU always uses gloo.
        device: Device of this process.
        init_method: URL at which the processes meet, see `torch.distributed.init_process_group`.
        timeout: Timeout of collectives.

    Returns:
        A store shared by all processes, for small messages; None if there is only one process.
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
    # A separate group, so that collectives on the CPU do not wait for those on the GPU.
    _cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    return dist.PrefixStore("messages", store)


def new_cpu_group() -> Any:
    """Create another gloo group of all ranks, for collectives of a background thread; None in a single process."""
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def destroy_process_group() -> None:
    """Destroy the process group, if there is one."""
    global _cpu_group
    _cpu_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def is_collective_error(error: Exception) -> bool:
    """Return whether a collective failed, as it does when another rank is gone, and not this rank's own work."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum `value` over all ranks, in place, and return it.

    Args:
        value: Tensor of any shape, of the same shape and dtype on every rank, on the device of the process.
    """
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def all_reduce_sum_on_cpu(value: Tensor) -> Tensor:
    """Return the sum of `value` over all ranks, on the CPU. Blocks: not for the training loop.

    A rank that has left is an error at once, where NCCL would wait for it.

    Args:
        value: Tensor of any shape, of the same shape and dtype on every rank.
    """
    value = value.cpu()
    if dist.is_initialized():
        dist.all_reduce(value, group=_cpu_group)
    return value


def all_gather_object(value: Any) -> list[Any]:
    """Return the picklable `value` of every rank, in the order of ranks. Blocks: not for the training loop."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_cpu_group)
    return values


def run_on_main(job: Callable[[], T]) -> T:
    """Run `job` on rank 0 only, and return its result on every rank.

    Raises:
        ValueError, OSError: Raised by `job`; on every rank.
    """
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
    """The largest of each of a few whole numbers over all ranks, once per step, that does not wait for the device.

    The all-reduce of a step runs while the next step is computed. Each exchange therefore returns the numbers of the
    previous one, the same on every rank. A single process gets its own numbers back at once.

    What is asked for by a number is asked for again in the step that passes before the answer. A flag (0 or 1) will do
    for what happens once; a request that can be met several times must say which time it means.
    """

    def __init__(self) -> None:
        self._sent: tuple[Any, Tensor] | None = None

    def exchange(self, *flags: int) -> Sequence[int]:
        """Start the exchange of this rank's numbers, 0 or more, and return the result of the previous exchange.

        To be called by every rank after every step, always with as many numbers.
        """
        if not dist.is_initialized():
            return flags
        values = torch.tensor(flags, dtype=torch.int64)
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_cpu_group, async_op=True)
        before, self._sent = self._sent, (work, values)
        if before is None:
            return [0] * len(flags)
        before[0].wait()
        return before[1].tolist()


@torch.no_grad()
def broadcast_from_main(value: Tensor) -> None:
    """Overwrite `value` with that of rank 0, in place.

    Args:
        value: Tensor of any shape, of the same shape and dtype on every rank, on the device of the process.
    """
    if dist.is_initialized():
        whole = value.contiguous()  # NCCL takes no others
        dist.broadcast(whole, src=0)
        if whole is not value:
            value.copy_(whole)


def broadcast_buffers(module: nn.Module) -> None:
    """Overwrite the buffers of a module with those of rank 0, which checkpoints are written from.

    The running statistics of batch norm differ between ranks during training; evaluation must use the same everywhere.
    """
    for buffer in module.buffers():
        broadcast_from_main(buffer)
