"""Depthwise convolutions over a grid of tokens: the pooling of queries, keys and values (MViTv2, Li et al., CVPR 2022).

`conv_pool` has two forms. The reference form moves heads to the batch axis and channels to the front, and calls
PyTorch's convolution. The fast form keeps the tokens in the layout in which the linear layer wrote them, heads side by
side and channels last, and has its own backward pass. On CPUs PyTorch's channels-last depthwise convolution is fast in
3-D for the forward pass and in 2-D for the gradient of the weight. The gradient of the input is therefore computed as a
forward convolution, and that of the weight frame by frame, once for each time step of the kernel. On CUDA,
MASKFEAT_TRITON=1 in the environment selects the Triton kernels of `pooling_triton`; they have not run on a GPU yet.

Shape legend: B samples, N tokens (the first `prefix` of them, such as a class token, are not on the grid), grid = ([T,]
H, W) tokens along each axis, N' tokens after pooling, G heads, C channels per head, D = G C.
"""

import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskfeat.errors import UserError
from maskfeat.models.base import conv_grid
from maskfeat.models.layers import full_precision, is_reference

Triple = tuple[int, int, int]

_ASKED = os.environ.get("MASKFEAT_TRITON") == "1"
"""Whether Triton kernels are used on CUDA."""

_convolution_backward = torch.ops.aten.convolution_backward


def conv_pool(
    tokens: Tensor, prefix: int, grid: Sequence[int], stride: Sequence[int], weight: Tensor, impl: str = "fast"
) -> Tensor:
    """Apply a depthwise convolution over the grid. All heads share one kernel.

    Args:
        tokens: (B, prefix + prod(grid), D); may be a slice of a wider tensor, as the queries of a fused projection are.
        prefix: number of leading tokens that are passed through unchanged.
        grid: ([T,] H, W) tokens along each axis.
        stride: stride along each axis of `grid`.
        weight: (C, 1, *kernel); each axis is padded by half the size of the kernel.
        impl: "fast" or "reference".

    Returns:
        (B, prefix + N', D), of the dtype of `tokens`.
    """
    if is_reference(impl):
        return reference_pool(tokens, prefix, grid, stride, weight)
    if len(grid) == 2:
        weight = weight.unsqueeze(2)
    return _PoolTokens.apply(tokens, prefix, _three(grid), _three(stride), weight)


def reference_pool(tokens: Tensor, prefix: int, grid: Sequence[int], stride: Sequence[int], weight: Tensor) -> Tensor:
    """The reference form of `conv_pool`."""
    channels, conv = len(weight), F.conv2d if len(grid) == 2 else F.conv3d
    by_head = tokens[:, prefix:].unflatten(-1, (-1, channels))  # (B, N, G, C)
    batch, _, heads, _ = by_head.shape
    images = by_head.permute(0, 2, 3, 1).reshape(batch * heads, channels, *grid)
    padding = [size // 2 for size in weight.shape[2:]]
    pooled = conv(images, weight, None, tuple(stride), padding, groups=channels)
    patches = pooled.reshape(batch, heads, channels, -1).permute(0, 3, 1, 2).flatten(2)  # (B, N', D)
    return torch.cat([tokens[:, :prefix], patches], dim=1)


class _PoolConv(nn.Module):
    """A depthwise convolution, with the weight of an ordinary convolution layer, that takes and returns tokens.

    Args:
        channels: C, channels per head.
        kernel, stride: along each axis of `grid`; the padding is half the kernel.
        grid: ([T,] H, W) tokens along each axis of the input.
        prefix: number of leading tokens that are passed through unchanged.
        impl: "fast" or "reference", see `conv_pool`.
    """

    weight: Tensor
    stride: tuple[int, ...]

    def __init__(
        self,
        channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        grid: Sequence[int],
        prefix: int,
        impl: str = "fast",
    ) -> None:
        padding = tuple(size // 2 for size in kernel)
        super().__init__(channels, channels, tuple(kernel), tuple(stride), padding, groups=channels, bias=False)
        self.grid, self.prefix, self.impl = tuple(grid), prefix, impl

    def forward(self, input: Tensor) -> Tensor:
        """Pool tokens: (B, prefix + prod(grid), D) -> (B, prefix + N', D), where D is a multiple of C."""
        return conv_pool(input, self.prefix, self.grid, self.stride, self.weight, self.impl)


class PoolConv2d(_PoolConv, nn.Conv2d):
    """Pooling of the tokens of images."""


class PoolConv3d(_PoolConv, nn.Conv3d):
    """Pooling of the tokens of clips."""


POOL_CONV: dict[int, type[PoolConv2d | PoolConv3d]] = {2: PoolConv2d, 3: PoolConv3d}
"""The pooling layer by the number of axes of the grid."""


def _three(values: Sequence[int]) -> Triple:
    """Return a size or stride with three axes; an image is a clip of one frame: (h, w) -> (1, h, w)."""
    t, h, w = (1, *values) if len(values) == 2 else values
    return t, h, w


class _PoolTokens(torch.autograd.Function):
    """The fast form of `conv_pool`; grid, stride and kernel have three axes here."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, prefix: int, grid: Triple, stride: Triple, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.settings = prefix, grid, stride
        with full_precision(tokens):
            patches = _forward(tokens[:, prefix:].unflatten(1, grid), weight, stride).flatten(1, 3)
        return torch.cat([tokens[:, :prefix], patches], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        prefix, grid, stride = ctx.settings
        patches = tokens[:, prefix:].unflatten(1, grid)
        if not patches.is_cuda:
            patches = patches.contiguous()  # otherwise every time step of the kernel would copy it
        pooled_grid = conv_grid(grid, weight.shape[2:], stride, _padding(weight))
        grad = grad.contiguous()
        grad_patches = grad[:, prefix:].unflatten(1, pooled_grid)
        grad_input = _grad_input(grad_patches, weight, stride, grid).flatten(1, 3)
        grad_weight = _grad_weight(patches, grad_patches, weight, stride).to(weight.dtype)
        return torch.cat([grad[:, :prefix], grad_input], dim=1), None, None, None, grad_weight


def _triton_kernels() -> ModuleType | None:
    """Return the module of the Triton kernels if MASKFEAT_TRITON is 1, otherwise None. Blocks are compiled with it.

    Raises:
        UserError: if they are asked for and Triton is not installed.
    """
    if not _ASKED:
        return None
    try:
        from maskfeat.models import pooling_triton
    except ImportError as error:
        raise UserError(
            f"MASKFEAT_TRITON is 1, but the Triton kernels cannot be imported ({error}): install triton, or unset "
            "MASKFEAT_TRITON to pool with PyTorch's convolutions"
        ) from error
    return pooling_triton


def _kernels_for(x: Tensor, weight: Tensor) -> ModuleType | None:
    """Return the Triton kernels if they apply: on CUDA, with kernels of odd sizes, and not in float64."""
    odd = all(size % 2 for size in weight.shape[2:])
    return _triton_kernels() if x.is_cuda and odd and x.dtype != torch.float64 else None


def _padding(weight: Tensor) -> list[int]:
    return [size // 2 for size in weight.shape[2:]]


def _working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to convolve in: PyTorch has no fast depthwise convolution for half precision on CPUs."""
    return x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32


def _forward(x: Tensor, weight: Tensor, stride: Triple) -> Tensor:
    """Convolve x (B, T, H, W, D) with weight (C, 1, kt, kh, kw): (B, T', H', W', D), of the dtype of x."""
    kernels = _kernels_for(x, weight)
    if kernels is not None:
        return kernels.forward(x, weight, stride)
    dtype = _working_dtype(x)
    heads = x.shape[-1] // len(weight)
    weight = weight.to(dtype).repeat(heads, 1, 1, 1, 1)
    clip = x.to(dtype).movedim(-1, 1)
    if clip.is_cuda:
        # PyTorch has a depthwise kernel for contiguous clips. Others it gives to cuDNN, as convolutions in groups.
        clip = clip.contiguous()
    return F.conv3d(clip, weight, None, stride, _padding(weight), groups=x.shape[-1]).movedim(1, -1).to(x.dtype)


def _grad_input(grad: Tensor, weight: Tensor, stride: Triple, size: Triple) -> Tensor:
    """Return the gradient of `_forward` with respect to x.

    Args:
        grad: (B, T', H', W', D), the gradient of the output.
        weight: (C, 1, kt, kh, kw).
        size: (T, H, W) of x.

    Returns:
        (B, T, H, W, D), of the dtype of `grad`.
    """
    kernels = _kernels_for(grad, weight)
    if kernels is not None:
        return kernels.grad_input(grad, weight, stride, size)
    if any(side % 2 == 0 for side in weight.shape[2:]):
        return _grad_input_even(grad, weight, stride, size)
    if stride != (1, 1, 1):
        # The gradient of a strided convolution is that of a convolution of stride 1 with zeros between the positions.
        spread = grad.new_zeros(len(grad), *size, grad.shape[-1])
        spread[:, :: stride[0], :: stride[1], :: stride[2]] = grad
        grad = spread
    return _forward(grad, weight.flip(2, 3, 4), (1, 1, 1))


def _grad_input_even(grad: Tensor, weight: Tensor, stride: Triple, size: Triple) -> Tensor:
    """Compute `_grad_input` for kernels of even sizes, which no published model has."""
    dtype, groups = _working_dtype(grad), grad.shape[-1]
    repeated = weight.to(dtype).repeat(groups // len(weight), 1, 1, 1, 1)
    clip = grad.new_empty(len(grad), groups, *size, dtype=dtype)
    grads = _convolution_backward(
        grad.to(dtype).movedim(-1, 1),
        clip,
        repeated,
        None,
        stride,
        _padding(repeated),
        (1, 1, 1),
        False,
        (0, 0, 0),
        groups,
        (True, False, False),
    )
    return grads[0].movedim(1, -1).to(grad.dtype)


def _frames(x: Tensor) -> Tensor:
    """Return (B, T, H, W, D) as (B T, D, H, W), channels last in memory."""
    return x.flatten(0, 1).movedim(-1, 1)


def _grad_weight(x: Tensor, grad: Tensor, weight: Tensor, stride: Triple) -> Tensor:
    """Return the gradient of `_forward` with respect to the weight.

    Args:
        x: (B, T, H, W, D), the input.
        grad: (B, T', H', W', D), the gradient of the output.
        weight: (C, 1, kt, kh, kw).

    Returns:
        float32 (float64 for a float64 input), of the shape of `weight`.
    """
    kernels = _kernels_for(x, weight)
    if kernels is not None:
        return kernels.grad_weight(x, grad, tuple(weight.shape), stride)
    dtype, groups = _working_dtype(x), x.shape[-1]
    x, grad = x.to(dtype), grad.to(dtype)
    like = weight.to(dtype)[:, :, 0].repeat(groups // len(weight), 1, 1, 1)
    parts, middle = [], weight.shape[2] // 2
    for step in range(weight.shape[2]):
        # Output frame t reads input frame t * stride + step - middle; only the frames that exist contribute.
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
    by_head = torch.stack(parts, dim=2).unflatten(0, (-1, len(weight)))
    return by_head.sum(0, dtype=torch.promote_types(dtype, torch.float32))
