"""What wraps a model from outside: mixed precision, activation checkpointing, several processes."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from maskfeat.distributed import World, from_first_rank

PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision on `device`: "bf16" or "fp16"; does nothing for "off"."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def checkpoint_activations(objective: nn.Module) -> None:
    """Recompute each block's activations in the backward pass (Chen et al., 2016): less memory, about a third more
    time, the same numbers. Parameter names stay as they are.
    """
    for block in objective.get_submodule("backbone.blocks").children():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def share_buffers(objective: nn.Module) -> None:
    """Give every rank the buffers of rank 0, from which checkpoints are written.

    Between two steps the running statistics of batch norms differ from rank to rank; evaluation must not.
    """
    for buffer in objective.buffers():
        from_first_rank(buffer)


def distribute(objective: nn.Module, world: World) -> nn.Module:
    """The objective for several processes: gradients are averaged over ranks."""
    if world.size == 1:
        return objective
    # Buffers are constants, or statistics of normalisation that the ranks share as is usual: PyTorch's default.
    return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)
