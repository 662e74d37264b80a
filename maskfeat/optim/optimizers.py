"""Optimizers: AdamW and SGD with fused kernels, their state, and gradient clipping."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from maskfeat.distributed.fsdp import global_norm, local_shard, shard_like
from maskfeat.errors import UserError


def make_optimizer(
    groups: Sequence[dict[str, Any]],
    method: str,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = True,
) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter, ICLR 2019; eps 1e-8) or SGD, with fused kernels.

    Args:
        groups: see `parameter_groups`.
        method: "adamw" or "sgd"; `betas` belong to the first, `momentum`, `dampening` and `nesterov` to the second.

    Raises:
        UserError: the method is another one, or `nesterov` goes with no momentum or with dampening.
    """
    initial = [{**group, "lr": lr * group["layer_decay"]} for group in groups]
    if method == "adamw":
        return torch.optim.AdamW(initial, lr=lr, betas=(betas[0], betas[1]), eps=1e-8, fused=True)
    if method == "sgd":
        if nesterov and (not momentum or dampening):
            raise UserError(
                "SOLVER.NESTEROV True needs SOLVER.MOMENTUM above 0 and SOLVER.DAMPENING 0; given "
                f"{momentum:g} and {dampening:g}"
            )
        return torch.optim.SGD(initial, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov, fused=True)
    raise UserError(f"SOLVER.OPTIMIZING_METHOD is {method!r}, expected 'adamw' or 'sgd'")


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load moments, step counts and the rates of the last step into an optimizer, sharded or not. Everything else
    (betas, momentum, weight decay, which kernels run) stays as the optimizer was made.

    Args:
        state: of an unsharded optimizer, the same on every rank, as `fsdp.full_optimizer_state_dict` returns it; where
            the parameters are sharded, each rank takes its shards.

    Raises:
        UserError: the file has other parameter groups than this model, those of another method, or moments of other
            shapes.
    """
    of_adamw = ["betas" in group for group in (state["param_groups"][0], optimizer.param_groups[0])]
    if of_adamw[0] != of_adamw[1]:
        methods = ["adamw" if adamw else "sgd" for adamw in of_adamw]
        raise UserError(
            f"the optimizer state is that of {methods[0]}, and SOLVER.OPTIMIZING_METHOD is {methods[1]!r}: restore it, "
            "or start a new run in another OUTPUT_DIR"
        )
    if [len(group["params"]) for group in state["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        raise UserError(
            "the optimizer state has other parameter groups: SOLVER.LAYER_DECAY, SOLVER.ZERO_WD_1D_PARAM or the "
            "model changed. Restore them, or start a new run in another OUTPUT_DIR"
        )
    # Before loading: PyTorch reads there whether steps are counted on the device.
    groups = [
        {**mine, "lr": theirs["lr"], "params": theirs["params"]}
        for theirs, mine in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    numbered = {
        number: parameter
        for theirs, mine in zip(state["param_groups"], optimizer.param_groups, strict=True)
        for number, parameter in zip(theirs["params"], mine["params"], strict=True)
    }
    for number, parameter in numbered.items():
        for name, value in state["state"].get(number, {}).items():
            # PyTorch compares no shapes, and its fused kernels would read and write beyond the end.
            if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                raise UserError(
                    f"the optimizer state is that of another model: {name} of parameter {number} has the shape "
                    f"{tuple(value.shape)}, and the parameter {tuple(parameter.shape)}. Start a new run in another "
                    "OUTPUT_DIR, from the weights alone"
                )
    cut = {
        number: {
            name: shard_like(value, numbered.get(number)) if torch.is_tensor(value) else value
            for name, value in slots.items()
        }
        for number, slots in state["state"].items()
    }
    optimizer.load_state_dict({"state": cut, "param_groups": groups})


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None, max_value: float | None) -> torch.Tensor:
    """Clip gradients in place by norm or by value.

    Returns:
        the total L2 norm before clipping, a scalar on the parameters' device, the same on every rank.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in with_grad if p.grad is not None]
    norm = global_norm(torch.nn.utils.get_total_norm([local_shard(grad) for grad in grads]), grads)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, norm)
    elif max_value:
        torch.nn.utils.clip_grad_value_(with_grad, max_value)
    return norm
