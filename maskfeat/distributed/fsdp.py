"""Tensors of which every rank holds a piece (FSDP2, `parallel.shard`): their pieces, and the whole of them again.

Everything here takes plain tensors as well, so that callers need not ask how a run is made parallel. What gathers is
collective: every rank calls it, in the same order.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from maskfeat.distributed.collectives import broadcast_buffers

Module = TypeVar("Module", bound=nn.Module)


def local_shard(value: Tensor) -> Tensor:
    """The plain tensor that lies on this rank; it shares the memory of `value`."""
    return value.to_local() if isinstance(value, DTensor) else value


def full_tensor(value: Tensor) -> Tensor:
    """The whole of a tensor, plain, on its device; collective where it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, own: Tensor | None) -> Tensor:
    """`value`, whole and the same on every rank, cut as `own` is; as it is where `own` is plain or of another shape.

    No rank waits for another.
    """
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or value.shape != own.shape:
        return value
    pieces = distribute_tensor(value.detach().to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    # Copied, since a piece may be a view that keeps the whole in memory.
    return torch.empty_like(own, requires_grad=False).copy_(pieces)


def global_norm(norm: Tensor, values: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all ranks from that of the pieces of this rank, a scalar; `norm` itself where they are plain."""
    if not values or not isinstance(values[0], DTensor):
        return norm
    norms = DTensor.from_local(norm.reshape(1), values[0].device_mesh, [Shard(0)], run_check=False).full_tensor()
    return torch.linalg.vector_norm(norms)


@torch.no_grad()
def gather_into(objective: nn.Module, twin: Module) -> Module:
    """Fill `twin`, a plain module of the same kind on the device, with the whole parameters of a sharded one, and on
    every rank with the buffers of rank 0; collective. Evaluation runs on it: ranks take different numbers of steps
    there, and a sharded module would wait for all of them in each.

    Returns:
        `twin`.
    """
    mine = objective.state_dict()
    for name, value in twin.state_dict().items():
        value.copy_(full_tensor(mine[name]))
    broadcast_buffers(twin)
    return twin


@torch.no_grad()
def full_state_dict(state: "OrderedDict[str, Tensor]", keep: bool) -> "OrderedDict[str, Tensor]":
    """Copies of the whole tensors of a state, such as `objective.released_state()`, on the CPU; collective.

    Args:
        keep: whether this rank wants them (rank 0, which writes a file); the others get an empty dict and hold no more
            than one whole tensor at a time.
    """
    kept: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in state.items():
        full = full_tensor(value)
        if keep:
            kept[name] = full.detach().to("cpu", copy=True)
    return kept


@torch.no_grad()
def full_optimizer_state_dict(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """What `optimizer.state_dict()` of an unsharded run would hold, its tensors whole and on the CPU; collective.

    `optim.load_optimizer_state` reads it back, sharded or not, in a world of any size.

    Args:
        keep: as in `full_state_dict`; the other ranks get an empty dict.
    """
    given = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for number, slots in given["state"].items():
        state[number] = {}
        for slot, value in slots.items():
            full = full_tensor(value) if isinstance(value, Tensor) else value
            if keep:
                state[number][slot] = full.to("cpu", copy=True) if isinstance(full, Tensor) else full
    return {"state": state, "param_groups": given["param_groups"]} if keep else {}
