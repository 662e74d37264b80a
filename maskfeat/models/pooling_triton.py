"""Depthwise convolution of tokens (the pooling of MViTv2) as Triton kernels, for CUDA devices.

PyTorch's depthwise conv3d expects channels first and stays far below the memory bandwidth. Here channels stay last, as
the linear layers leave them, and each kernel reads and writes every token once: values that several taps use come from
registers (along W) and from the caches (along T and H). Sums are accumulated in float32.

The kernels are opt-in (MASKFEAT_TRITON=1, see `pooling`): they are tested under Triton's interpreter and compiled for
compute capability 9.0, but have not run on a GPU yet.

Shape legend: B samples, T x H x W positions of the input, T' x H' x W' positions of the output, D = G C channels of all
heads side by side (channel d is filtered by weight[d % C]), kt x kh x kw taps. Images have T = T' = kt = 1.

Kernels are launched on the current CUDA device, which must be the device of the tensors.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, assignment"
# (Triton has no type annotations.)

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from maskfeat.models.base import conv_grid
from maskfeat.models.pooling_kernels import forward_kernel, grad_input_kernel, grad_weight_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_THREADS = 128  # per program: Triton's default of four warps
# Bytes that a thread loads at once. 16 would save instructions, but with twice the sums in registers half as many warps
# fit on a multiprocessor.
_LOAD_BYTES = 8
_STRIPS = (8, 7, 6, 5, 4)  # possible lengths of a strip
_PROGRAMS = 1024  # for `grad_weight`: a few per multiprocessor, with partial sums of a few megabytes
_INT32 = 2**31


def _token_stride(x: Tensor) -> int:
    """Return the stride in elements between the tokens of x (B, T, H, W, D), which must be the same everywhere."""
    _, _, height, width, depth = x.shape
    steps = {x.stride(axis) // inner for axis, inner in ((3, 1), (2, width), (1, height * width)) if x.shape[axis] > 1}
    assert x.dtype in DTYPES and x.stride(4) == 1 and len(steps) <= 1, (x.dtype, x.shape, x.stride())
    token = steps.pop() if steps else depth
    for axis, inner in ((3, 1), (2, width), (1, height * width)):
        assert x.shape[axis] == 1 or x.stride(axis) == inner * token, (x.shape, x.stride())
    return token


def _wide(*tensors: Tensor) -> bool:
    """Return whether an offset into one of the tensors needs int64."""
    return any(sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) >= _INT32 for x in tensors)


def _table(weight: Tensor) -> Tensor:
    """Return weight (C, 1, kt, kh, kw) as (kt kh kw, C) float32 contiguous, for coalesced loads."""
    flat = weight.flatten(1).t()
    return torch.empty(flat.shape, dtype=torch.float32, device=weight.device).copy_(flat)


def _strip(size: int, multiple: int) -> int:
    """Return the length of a strip along an axis of `size`: a multiple of `multiple` that wastes least at the end."""
    lengths = [n for n in _STRIPS if n % multiple == 0] or [multiple]
    return min(lengths, key=lambda n: (-(-size // n) * n, -n))


def _block(width: int, elements: int) -> tuple[int, int]:
    """Return (BLOCK_P, BLOCK_D) of a program whose tensors have `elements` elements each."""
    channels = 64 if width % 64 == 0 else 32
    return elements // channels, channels


def _forward_strip(size: int, stride: int, taps: int) -> int:
    """Return the length of a strip of output positions: 1 if neighbours share no input, for more programs at once."""
    return _strip(size, 1) if stride < taps else 1


def pooled_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Return the output size (T', H', W') for an input (T, H, W) with padding k // 2."""
    return conv_grid(size, kernel, stride, [k // 2 for k in kernel])


@triton_op("maskfeat::pooling_forward", mutates_args=())
def forward(x: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    """Compute a depthwise convolution with padding k // 2, without bias.

    Args:
        x: (B, T, H, W, D) float32, bfloat16 or float16. Tokens (a slice of a fused projection) and samples (behind a
            class token) may have gaps between them, if all gaps are equal.
        weight: (C, 1, kt, kh, kw) of any dtype; k odd; D = G C.
        stride: (st, sh, sw).

    Returns:
        (B, T', H', W', D) contiguous, of the dtype of `x`; summed in float32.
    """
    batch, *size, width = x.shape
    channels, _, *kernel = weight.shape
    assert width % channels == 0 and all(k % 2 for k in kernel), (x.shape, weight.shape)
    out = pooled_size(size, kernel, stride)
    y = torch.empty((batch, *out, width), dtype=x.dtype, device=x.device)
    strip = _forward_strip(out[2], stride[2], kernel[2])
    block_p, block_d = _block(width, _THREADS * _LOAD_BYTES // x.element_size())
    strips = batch * out[0] * out[1] * triton.cdiv(out[2], strip)
    grid = (triton.cdiv(strips, block_p) * triton.cdiv(width, block_d),)
    wrap_triton(forward_kernel)[grid](
        x,
        _table(weight),
        y,
        x.stride(0),
        strips,
        *size,
        *out,
        width,
        channels,
        _token_stride(x),
        *stride,
        *kernel,
        strip,
        block_p,
        block_d,
        _wide(x, y),
    )
    return y


@triton_op("maskfeat::pooling_grad_input", mutates_args=())
def grad_input(grad: Tensor, weight: Tensor, stride: Sequence[int], size: Sequence[int]) -> Tensor:
    """Compute the gradient of `forward` with respect to x.

    Every position gathers its own sum, without atomics, so that results are deterministic.

    Args:
        grad: (B, T', H', W', D), with strides as `forward` allows for x.
        weight: (C, 1, kt, kh, kw), as given to `forward`.
        stride: (st, sh, sw).
        size: (T, H, W) of x.

    Returns:
        (B, T, H, W, D) contiguous, of the dtype of `grad`; summed in float32.
    """
    batch, *out, width = grad.shape
    channels, _, *kernel = weight.shape
    assert pooled_size(size, kernel, stride) == tuple(out), (grad.shape, weight.shape, stride, size)
    dx = torch.empty((batch, *size, width), dtype=grad.dtype, device=grad.device)
    strip = _strip(size[2], stride[2])
    block_p, block_d = _block(width, _THREADS * _LOAD_BYTES // grad.element_size())
    strips = batch * size[0] * size[1] * triton.cdiv(size[2], strip)
    grid = (triton.cdiv(strips, block_p) * triton.cdiv(width, block_d),)
    wrap_triton(grad_input_kernel)[grid](
        grad,
        _table(weight),
        dx,
        grad.stride(0),
        strips,
        *size,
        *out,
        width,
        channels,
        _token_stride(grad),
        *stride,
        *kernel,
        strip,
        block_p,
        block_d,
        _wide(grad, dx),
    )
    return dx


@triton_op("maskfeat::pooling_grad_weight", mutates_args=())
def grad_weight(x: Tensor, grad: Tensor, weight_shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Compute the gradient of `forward` with respect to the weight.

    Sums are in a fixed order, so that results are deterministic.

    Args:
        x: (B, T, H, W, D), as given to `forward`.
        grad: (B, T', H', W', D), with strides as `forward` allows for x.
        weight_shape: (C, 1, kt, kh, kw).
        stride: (st, sh, sw).

    Returns:
        (C, 1, kt, kh, kw) float32.
    """
    batch, *size, width = x.shape
    channels, _, *kernel = weight_shape
    out = tuple(grad.shape[1:4])
    assert pooled_size(size, kernel, stride) == out, (x.shape, grad.shape, weight_shape, stride)
    strip = _forward_strip(out[2], stride[2], kernel[2])
    # Few channels per thread: each thread holds the sums of all taps.
    block_p, block_d = _block(width, _THREADS * 4 // x.element_size())
    strips = batch * out[0] * out[1] * triton.cdiv(out[2], strip)
    blocks_d = triton.cdiv(width, block_d)
    chunk = max(triton.cdiv(strips, max(_PROGRAMS // blocks_d, 1) * block_p), 1) * block_p
    programs = triton.cdiv(strips, chunk)
    partial = torch.empty((programs, math.prod(kernel), width), dtype=torch.float32, device=x.device)
    wrap_triton(grad_weight_kernel)[(programs * blocks_d,)](
        x,
        grad,
        partial,
        x.stride(0),
        grad.stride(0),
        strips,
        chunk,
        *size,
        *out,
        width,
        _token_stride(x),
        _token_stride(grad),
        *stride,
        *kernel,
        strip,
        block_p,
        block_d,
        _wide(x, grad),
    )
    summed = partial.view(programs, math.prod(kernel), width // channels, channels).sum((0, 2))
    return summed.t().reshape(channels, 1, *kernel)
