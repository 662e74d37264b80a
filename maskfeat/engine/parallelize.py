"""What wraps a model from outside: mixed precision, activation checkpointing, compilation, several processes."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch._dynamo
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from maskfeat.distributed.world import World
from maskfeat.objectives.base import Objective

PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision on `device`: "bf16" or "fp16"; does nothing for "off"."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def apply_activation_checkpointing(objective: Objective, light: bool = False) -> None:
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


def apply_compile(objective: Objective, device: torch.device) -> None:
    """torch.compile each block of the backbone by itself, and what objectives name in `compilable`.

    Blocks of one shape share what is compiled; parameter names stay as they are. To be called after
    `apply_activation_checkpointing`.

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


def apply_fsdp(objective: Objective, world: World, device: torch.device) -> None:
    """Cut parameters, gradients and optimizer state into as many pieces as there are ranks (FSDP2; Zhao et al., VLDB
    2023), in place. Each block of the backbone is put together for its forward and its backward pass only, the rest for
    the whole step. Numbers are those of DistributedDataParallel: parameters and sums are float32.

    Call it after `apply_activation_checkpointing` and `apply_compile`, and before the optimizer is made, whose
    parameters are the pieces. One process keeps the whole.

    Args:
        objective: on the CPU or on `device`, the same on every rank; from the CPU no more than one block at a time lies
            whole on the device.
    """
    if world.size == 1:
        objective.to(device)
        return
    mesh = init_device_mesh(device.type, (world.size,))
    for part in (*objective.backbone.repeated_blocks(), objective):
        fully_shard(part, mesh=mesh)


def apply_ddp(objective: nn.Module, world: World, static: bool = False) -> nn.Module:
    """The objective for several processes: gradients are averaged over ranks. A sharded one is so already.

    Args:
        static: every step goes through the same graph, once. Not so where gradients are accumulated.
    """
    if world.size == 1 or isinstance(objective, FSDPModule):
        return objective
    # Buffers are constants, or statistics of normalisation that the ranks share as is usual: PyTorch's default.
    return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True, static_graph=static)


@contextmanager
def gradient_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Ranks exchange gradients once a step, in the backward pass of its last micro-batch; until then each adds up its
    own (of a sharded model, too, a rank holds whole gradients for so long).
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
