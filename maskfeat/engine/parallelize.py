"""Mixed precision, activation checkpointing, compilation, DDP and FSDP2: applied to a model from outside."""

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from maskfeat.distributed.world import World
from maskfeat.errors import UserError
from maskfeat.objectives.base import Objective

PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return an autocast context for "bf16" or "fp16" on `device`; one that does nothing for "off"."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def choose_kernels(tf32: bool, benchmark: bool) -> None:
    """Let NVIDIA GPUs compute faster and less exactly, or less reproducibly; of no effect elsewhere.

    Args:
        tf32: multiply float32 matrices with 10 bits of mantissa instead of 23. Convolutions do in any case, PyTorch's
            default.
        benchmark: cuDNN times the algorithms of each convolution and takes the fastest, which may be another one in
            the next run. Not where deterministic algorithms are asked of PyTorch.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.benchmark = benchmark and not torch.are_deterministic_algorithms_enabled()


def apply_activation_checkpointing(objective: Objective, light: bool = False) -> None:
    """Recompute activations in the backward pass instead of storing them (Chen et al., 2016): less memory, the same
    numbers. Parameter names do not change.

    Args:
        light: recompute only what is cheap, which modules list in `recomputable`: norms, activations, pooling.
            Otherwise whole blocks, which takes about a third more time.
    """
    if light:
        for module in objective.modules():
            for name in getattr(module, "recomputable", ()):
                setattr(module, name, _checkpointed(getattr(module, name)))
        return
    for block in objective.backbone.repeated_blocks():
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` with its activations recomputed. A partial of `checkpoint` would not be compiled: the compiler
    skips that function where it is called first, and takes it as an operator where another one calls it.
    """

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputing


def apply_compile(objective: Objective, device: torch.device) -> None:
    """Compile each block of the backbone by itself, and the methods that objectives list in `compilable`.

    Blocks of the same shape share compiled code; parameter names do not change. Call it after
    `apply_activation_checkpointing`.

    Raises:
        UserError: this machine has no compiler.
    """
    wanted = [os.environ.get("CXX", ""), "g++", "clang++"] if device.type == "cpu" else ["gcc", "cc", "clang"]
    if not any(name and shutil.which(name) for name in wanted):
        raise UserError(
            f"TRAIN.COMPILE is True, but this machine has no compiler ({', '.join(filter(None, wanted))}): "
            "install one, or set TRAIN.COMPILE False"
        )
    if device.type != "cpu" and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise UserError(
            "TRAIN.COMPILE is True, and Triton, which compiles for GPUs, needs the headers of Python (Python.h, in a "
            "package such as python3-dev): install them, or set TRAIN.COMPILE False"
        )
    # Blocks that are recomputed would draw from generators of their own, which no seed of a step reaches.
    torch._functorch.config.graphsafe_rng_functionalization = False
    blocks = objective.backbone.repeated_blocks()
    # Blocks may differ (strides, drop path), and between training and evaluation: PyTorch gives up after 8 variants.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile()
    for module in objective.modules():
        for name in getattr(module, "compilable", ()):
            setattr(module, name, torch.compile(getattr(module, name)))


def apply_fsdp(objective: Objective, world: World, device: torch.device) -> None:
    """Shard parameters, gradients and optimizer state over all ranks (FSDP2; Zhao et al., VLDB 2023), in place.

    Each block of the backbone is gathered for its forward and its backward pass only, the rest for the whole step.
    Numbers are those of DistributedDataParallel: parameters and reductions are float32.

    Call it after `apply_activation_checkpointing` and `apply_compile`, and before the optimizer is made, whose
    parameters are the shards. With one process nothing is sharded.

    Args:
        objective: on the CPU or on `device`, the same on every rank. From the CPU, at most one block at a time is
            unsharded on the device.
    """
    if world.size == 1:
        objective.to(device)
        return
    mesh = init_device_mesh(device.type, (world.size,))
    for part in (*objective.backbone.repeated_blocks(), objective):
        fully_shard(part, mesh=mesh)


def apply_ddp(objective: nn.Module, world: World, static: bool = False) -> nn.Module:
    """Wrap the objective in DistributedDataParallel where there are several processes, unless it is sharded.

    Args:
        static: every step runs the same graph, once; not the case where gradients are accumulated.
    """
    if world.size == 1 or isinstance(objective, FSDPModule):
        return objective
    model = nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True, static_graph=static)
    # Not before every forward pass: buffers are constants, or running statistics of batch norm, which training does not
    # read; before evaluation and in checkpoints they are those of rank 0 (`collectives.broadcast_buffers`). Set here,
    # because the argument's name depends on PyTorch's version.
    model.broadcast_buffers = False
    return model


@contextmanager
def gradient_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Reduce gradients over ranks only in the backward pass of the last micro-batch of a step; until then each rank
    accumulates its own (with FSDP2 as well, which then holds unsharded gradients).
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
