"""Depthwise pooling of queries, keys and values with their heads side by side (MViTv2, Li et al., CVPR 2022).

Tokens stay where the linear layer wrote them: nothing is transposed to channels first and back. On CPUs PyTorch is fast
at depthwise convolutions whose channels come last forwards in 3-D, and at their weights' gradients in 2-D. So gradients
of inputs are convolutions forwards, and those of weights are taken frame by frame, for each time step of the kernel.
On CUDA, `pooling_triton` has kernels of its own.

Shape legend: B samples, N tokens (`prefix` of them stand for no place and come first), grid = ([T,] H, W) tokens along
each axis, G heads, C channels of one head, D = G C.
"""

import math
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskfeat.models.base import conv_grid
from maskfeat.models.layers import full_precision

Triple = tuple[int, int, int]

_convolution_backward = torch.ops.aten.convolution_backward


@cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, where Triton is installed and MASKFEAT_TRITON is not 0."""
    if os.environ.get("MASKFEAT_TRITON") == "0":
        return None
    try:
        from maskfeat.models import pooling_triton
    except ImportError:
        return None
    return pooling_triton


def _on_gpu(x: Tensor, weight: Tensor) -> ModuleType | None:
    """The kernels for CUDA, where they can do it: odd kernels, and not in float64."""
    odd = all(side % 2 for side in weight.shape[2:])
    return _kernels() if x.is_cuda and odd and x.dtype != torch.float64 else None


def _padding(weight: Tensor) -> list[int]:
    return [size // 2 for size in weight.shape[2:]]


def _forward(x: Tensor, weight: Tensor, stride: Triple) -> Tensor:
    """x (B, T, H, W, D), weight (C, 1, kt, kh, kw) -> (B, T', H', W', D) of the dtype of x."""
    kernels = _on_gpu(x, weight)
    if kernels is not None:
        return kernels.forward(x, weight, stride)
    dtype = _working_dtype(x)
    heads = x.shape[-1] // len(weight)
    weight = weight.to(dtype).repeat(heads, 1, 1, 1, 1)
    clip = x.to(dtype).movedim(-1, 1)
    return F.conv3d(clip, weight, None, stride, _padding(weight), groups=x.shape[-1]).movedim(1, -1).to(x.dtype)


def _working_dtype(x: Tensor) -> torch.dtype:
    """What PyTorch convolves in: CPUs have no fast depthwise convolution for halves."""
    return x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32


def _frames(x: Tensor) -> Tensor:
    """(B, T, H, W, D) -> (B T, D, H, W), channels last in memory."""
    return x.flatten(0, 1).movedim(-1, 1)


def _grad_input(grad: Tensor, weight: Tensor, stride: Triple, size: Triple) -> Tensor:
    """grad (B, T', H', W', D) -> (B, T, H, W, D) with `size` = (T, H, W)."""
    kernels = _on_gpu(grad, weight)
    if kernels is not None:
        return kernels.grad_input(grad, weight, stride, size)
    if any(side % 2 == 0 for side in weight.shape[2:]):
        return _grad_in_3d(grad, weight, stride, size)
    if stride != (1, 1, 1):
        # With zeros between its places, as far apart as the stride, it is the gradient of a convolution of stride 1.
        spread = grad.new_zeros(len(grad), *size, grad.shape[-1])
        spread[:, :: stride[0], :: stride[1], :: stride[2]] = grad
        grad = spread
    return _forward(grad, weight.flip(2, 3, 4), (1, 1, 1))


def _grad_in_3d(grad: Tensor, weight: Tensor, stride: Triple, size: Triple) -> Tensor:
    """`_grad_input` for even kernels, which no published model has."""
    dtype, groups = _working_dtype(grad), grad.shape[-1]
    whole = weight.to(dtype).repeat(groups // len(weight), 1, 1, 1, 1)
    clip = grad.new_empty(len(grad), groups, *size, dtype=dtype)
    grads = _convolution_backward(
        grad.to(dtype).movedim(-1, 1),
        clip,
        whole,
        None,
        stride,
        _padding(whole),
        (1, 1, 1),
        False,
        (0, 0, 0),
        groups,
        (True, False, False),
    )
    return grads[0].movedim(1, -1).to(grad.dtype)


def _grad_weight(x: Tensor, grad: Tensor, weight: Tensor, stride: Triple) -> Tensor:
    """x (B, T, H, W, D), grad (B, T', H', W', D) -> float32 (or float64) of the shape of weight (C, 1, kt, kh, kw)."""
    kernels = _on_gpu(x, weight)
    if kernels is not None:
        return kernels.grad_weight(x, grad, tuple(weight.shape), stride)
    dtype, groups = _working_dtype(x), x.shape[-1]
    x, grad = x.to(dtype), grad.to(dtype)
    like = weight.to(dtype)[:, :, 0].repeat(groups // len(weight), 1, 1, 1)
    parts, middle = [], weight.shape[2] // 2
    for step in range(weight.shape[2]):
        # Output place t has seen input place stride x t + step - middle: those of them that exist.
        first = math.ceil(max(middle - step, 0) / stride[0])
        last = min((x.shape[1] - 1 - step + middle) // stride[0], grad.shape[1] - 1)
        if last < first:
            parts.append(torch.zeros_like(like))
            continue
        start = first * stride[0] + step - middle
        seen = x[:, start : start + (last - first) * stride[0] + 1 : stride[0]]
        grads = _convolution_backward(
            _frames(grad[:, first : last + 1]),
            _frames(seen),
            like,
            None,
            stride[1:],
            _padding(like),
            (1, 1),
            False,
            (0, 0),
            groups,
            (False, True, False),
        )
        parts.append(grads[1])
    return torch.stack(parts, dim=2).unflatten(0, (-1, len(weight))).sum(0)


class _PoolTokens(torch.autograd.Function):
    """See `pool_tokens`; strides and weights have three axes here, and so has the grid."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, prefix: int, grid: Triple, strides: tuple[Triple, ...], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(tokens, *weights)
        ctx.settings = prefix, grid, strides
        width = tokens.shape[-1] // len(weights)
        pooled = []
        with full_precision(tokens):
            for part, weight, stride in zip(tokens.split(width, dim=-1), weights, strides, strict=True):
                patches = _forward(part[:, prefix:].unflatten(1, grid), weight, stride).flatten(1, 3)
                pooled.append(torch.cat([part[:, :prefix], patches], dim=1))
        return tuple(pooled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, *weights = ctx.saved_tensors
        prefix, grid, strides = ctx.settings
        width = tokens.shape[-1] // len(weights)
        of_tokens = torch.empty_like(tokens)
        of_weights = []
        columns = zip(tokens.split(width, dim=-1), of_tokens.split(width, dim=-1), strict=True)
        for (part, into), weight, stride, grad in zip(columns, weights, strides, grads, strict=True):
            into[:, :prefix] = grad[:, :prefix]
            seen = part[:, prefix:].unflatten(1, grid)
            if not seen.is_cuda:
                seen = seen.contiguous()  # or every step of the kernel would copy it
            small = conv_grid(grid, weight.shape[2:], stride, _padding(weight))
            grad = grad.contiguous()[:, prefix:].unflatten(1, small)
            into[:, prefix:] = _grad_input(grad, weight, stride, grid).flatten(1, 3)
            of_weights.append(_grad_weight(seen, grad, weight, stride).to(weight.dtype))
        return of_tokens, None, None, None, *of_weights


def _three(values: Sequence[int]) -> Triple:
    """Images are clips of one frame: (h, w) -> (1, h, w)."""
    t, h, w = (1, *values) if len(values) == 2 else values
    return t, h, w


def pool_tokens(
    tokens: Tensor, prefix: int, grid: Sequence[int], strides: Sequence[Sequence[int]], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Depthwise convolutions over the grid, each on its own share of the channels; heads share a kernel.

    Args:
        tokens: (B, prefix + prod(grid), len(weights) x D), such as queries, keys and values of one linear layer.
        prefix: tokens in front that are left as they are.
        strides: for each share, along the axes of `grid`.
        weights: for each share (C, 1, *kernel), kernels of odd sizes, padded by half of them.

    Returns:
        for each share (B, prefix + prod(its pooled grid), D), of the dtype of `tokens`.
    """
    if len(grid) == 2:
        weights = [weight.unsqueeze(2) for weight in weights]
    return _PoolTokens.apply(tokens, prefix, _three(grid), tuple(_three(stride) for stride in strides), *weights)
