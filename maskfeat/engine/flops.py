"""Parameters, multiply-adds and activations of a backbone, counted from shapes alone: nothing is computed.

PyTorch's own counter does the counting. fvcore traces a model with TorchScript, which supports neither the meta device
nor the custom autograd functions of the attention, and does not count `scaled_dot_product_attention`.
"""

import math
from contextlib import ExitStack
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from maskfeat.models.base import Backbone


class Cost(NamedTuple):
    """Parameters, and multiply-adds and activations for one clip.

    Activations are the elements that convolutions and matrix products return (Radosavovic et al., CVPR 2020),
    attention weights included, although fused attention does not store them.
    """

    parameters: int
    multiply_adds: float
    activations: int


class _Tokens(nn.Module):
    """Calls `forward_tokens` as a module, so that the counter knows the names of the modules below."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone

    def forward(self, clip: Tensor) -> Tensor:
        tokens: Tensor = cast(Backbone, self.backbone).forward_tokens(clip).x
        return tokens


def _elements(*_args: Any, out_shape: Any, **_kwargs: Any) -> int:
    """Elements of an operator's output, or of its first one; in place of its FLOPs."""
    first = out_shape[0] if out_shape and isinstance(out_shape[0], tuple | torch.Size) else out_shape
    return math.prod(first)


def _count(backbone: Backbone, *counters: FlopCounterMode) -> None:
    """Pass one clip, of the size that the backbone was built for, through it while the counters count."""
    assert isinstance(backbone, nn.Module)
    tokens = _Tokens(backbone).eval()  # one sample is too few for batch statistics
    clip = torch.empty(1, 3, *backbone.clip_size, device="meta")
    with torch.no_grad(), ExitStack() as stack:
        for counter in counters:
            stack.enter_context(counter)
        tokens(clip)


def multiply_adds(backbone: Backbone) -> float:
    """Return the multiply-adds of a backbone for one clip of the size that it was built for.

    Relative positions are counted as they are computed here: folded into queries and keys, padding included.

    Args:
        backbone: built on the meta device; left in evaluation mode.
    """
    counter = FlopCounterMode(display=False)
    _count(backbone, counter)
    return counter.get_total_flops() / 2


def module_costs(backbone: Backbone) -> dict[str, Cost]:
    """Return the cost of each child module of a backbone (of a `ModuleList`, of each of its elements) and the "total".

    Modules without parameters, multiply-adds and activations are left out.

    Args:
        backbone: built on the meta device; left in evaluation mode.
    """
    assert isinstance(backbone, nn.Module)
    flops = FlopCounterMode(display=False)
    outputs = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(flop_registry, _elements))
    _count(backbone, flops, outputs)

    def cost(module: nn.Module, name: str) -> Cost:
        counted = (sum(counter.get_flop_counts().get(name, {}).values()) for counter in (flops, outputs))
        operations, elements = counted
        return Cost(sum(p.numel() for p in module.parameters()), operations / 2, elements)

    costs = {}
    for name, child in backbone.named_children():
        parts = child.named_children() if isinstance(child, nn.ModuleList) else ()
        for path, module in [(f"{name}.{number}", part) for number, part in parts] or [(name, child)]:
            costs[path] = cost(module, f"{_Tokens.__name__}.backbone.{path}")
    return {**{path: found for path, found in costs.items() if any(found)}, "total": cost(backbone, "Global")}


def cost_table(costs: dict[str, Cost]) -> list[str]:
    """Return the lines of a table of `module_costs`; neighbours in a list that cost the same share a line."""
    lines = [f"{'module':<22}" + "".join(f"{name:>16}" for name in ("parameters", "multiply-adds", "activations"))]
    for (cost, _), group in groupby(costs.items(), key=lambda item: (item[1], item[0].rpartition(".")[0])):
        names = [name for name, _ in group]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].rpartition('.')[2]}, each"
        lines.append(f"{name:<22}" + "".join(f"{_short(value):>16}" for value in cost))
    return lines


def _short(value: float) -> str:
    """A number with a unit: 17563060224 is "17.56 G"."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f}"
