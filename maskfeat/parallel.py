"""What wraps a model from outside: mixed precision, activation checkpointing, compilation, several processes."""

import os
import shutil
from functools import partial

import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

from maskfeat.distributed import World, from_first_rank
from maskfeat.objectives.base import Objective

PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision on `device`: "bf16" or "fp16"; does nothing for "off"."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def checkpoint_activations(objective: Objective, light: bool = False) -> None:
    """Compute activations again in the backward pass rather than keep them (Chen et al., 2016): less memory, the same
    numbers. Parameter names stay as they are.

    Args:
        light: only what costs next to nothing to compute again, which modules name in `recomputable`: norms,
            activations, pooling. Otherwise whole blocks, which takes about a third more time.
    """
    if light:
        for module in objective.modules():
            for name in getattr(module, "recomputable", ()):
                setattr(module, name, partial(checkpoint, getattr(module, name), use_reentrant=False))
        return
    for block in objective.backbone.repeated_blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_parts(objective: Objective, device: torch.device) -> None:
    """torch.compile each block of the backbone by itself, and what objectives name in `compilable`.

    Blocks of one shape share what is compiled; parameter names stay as they are. To be called after
    `checkpoint_activations`.

    Raises:
        ValueError: where this machine lacks the compiler.
    """
    wanted = [os.environ.get("CXX", ""), "g++", "clang++"] if device.type == "cpu" else ["gcc", "cc", "clang"]
    if not any(name and shutil.which(name) for name in wanted):
        raise ValueError(
            f"TRAIN.COMPILE is True, but this machine has no compiler ({', '.join(filter(None, wanted))}): "
            "install one, or set TRAIN.COMPILE False"
        )
    blocks = objective.backbone.repeated_blocks()
    # Every block may differ (strides, drop path), in training mode and out of it: PyTorch gives up at 8 variants.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile()
    for module in objective.modules():
        for name in getattr(module, "compilable", ()):
            setattr(module, name, torch.compile(getattr(module, name)))


def share_buffers(objective: nn.Module) -> None:
    """Give every rank the buffers of rank 0, from which checkpoints are written.

    Between two steps the running statistics of batch norms differ from rank to rank; evaluation must not.
    """
    for buffer in objective.buffers():
        from_first_rank(buffer)


def distribute(objective: nn.Module, world: World, static: bool = False) -> nn.Module:
    """The objective for several processes: gradients are averaged over ranks.

    Args:
        static: every step goes through the same graph, once. Not so where gradients are accumulated.
    """
    if world.size == 1:
        return objective
    # Buffers are constants, or statistics of normalisation that the ranks share as is usual: PyTorch's default.
    return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True, static_graph=static)
