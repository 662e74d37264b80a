"""Convert between the sharded tensors of FSDP2 (DTensor, see `engine.parallelize`) and full tensors.

All functions accept plain tensors as well, so that callers need not know how a run is parallelized. Those described as
collective must be called by every rank in the same order.
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
    """Return the local shard of a tensor as a plain tensor that shares its memory; a plain tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value


def full_tensor(value: Tensor) -> Tensor:
    """Return the full tensor as a plain tensor on the same device. Collective if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, own: Tensor | None) -> Tensor:
    """Shard a full tensor like another tensor, without communication.

    Args:
        value: A full tensor, the same on every rank.
        own: The tensor whose device mesh and placements are used.

    Returns:
        The shard as a DTensor; `value` itself if `own` is a plain tensor or has another shape.
    """
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or value.shape != own.shape:
        return value
    shard = distribute_tensor(value.detach().to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    # Copied, because the shard may be a view that keeps the full tensor in memory.
    return torch.empty_like(own, requires_grad=False).copy_(shard)


def global_norm(norm: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of sharded tensors over all ranks. Collective if they are sharded.

    Args:
        norm: L2 norm of the local shards, a scalar.
        values: The tensors.

    Returns:
        A scalar; `norm` itself if the tensors are plain.
    """
    if not values or not isinstance(values[0], DTensor):
        return norm
    norms = DTensor.from_local(norm.reshape(1), values[0].device_mesh, [Shard(0)], run_check=False).full_tensor()
    return torch.linalg.vector_norm(norms)


@torch.no_grad()
def gather_into(objective: nn.Module, twin: Module) -> Module:
    """Copy the full parameters of a sharded module, and the buffers of rank 0, into an unsharded one. Collective.

    Evaluation uses the unsharded module: ranks take different numbers of evaluation steps, and a sharded module would
    make every step wait for all ranks.

    Args:
        objective: The sharded module.
        twin: An unsharded module of the same architecture, on the device.

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
    """Return copies of the full tensors of a state dict on the CPU. Collective.

    Args:
        state: A state dict, such as `objective.released_state()`.
        keep: Whether this rank needs the result, as rank 0 does to write a file. The other ranks get an empty dict and
            hold at most one full tensor at a time.
    """
    kept: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in state.items():
        full = full_tensor(value)
        if keep:
            kept[name] = full.detach().to("cpu", copy=True)
    return kept


@torch.no_grad()
def full_optimizer_state_dict(optimizer: Optimizer, keep: bool) -> dict[str, Any]:
    """Return the `state_dict()` of an optimizer with full tensors on the CPU, as in an unsharded run. Collective.

    `optim.optimizers.load_optimizer_state` loads it with any world size, sharded or not.

    Args:
        optimizer: The optimizer, of sharded or plain parameters.
        keep: As in `full_state_dict`.
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
