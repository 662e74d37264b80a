"""Depthwise convolution of tokens (MViTv2's pooling) as Triton kernels, for CUDA devices.

PyTorch's depthwise conv3d wants the channels before the places and stands far off what the memory allows. Here the
channels stay last, as the linear layers leave them, and each kernel reads and writes a token once from memory: what
the taps of a kernel share comes from registers (along W) and from the caches (along T and H). Sums are float32.

Shape legend: B samples, T x H x W places that come in, T' x H' x W' places that go out, D = G * C channels of all
heads side by side (channel d is filtered by weight[d % C]), kt x kh x kw taps. Images have T = T' = kt = 1.

How the work is cut: a strip is a few neighbouring places along W, held in registers; a program takes BLOCK_P strips
times BLOCK_D channels. All strips, over samples, T and H too, stand in one line. Which taps meet which places of a
strip is known when a kernel is compiled, for strips start at multiples of the stride.

The launches go to the current CUDA device, which has to be the one that holds the tensors.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, assignment"
# (Triton has no types: what the kernels take is its own business, and so is a tuple of sums that grows.)

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_THREADS = 128  # of a program: Triton's own choice of four warps
# One thread's load: 16 bytes would save instructions, but twice the sums halve the warps that a multiprocessor holds.
_LOAD_BYTES = 8
_STRIPS = (8, 7, 6, 5, 4)  # places of a strip
_PROGRAMS = 1024  # of `grad_weight`: a few for each multiprocessor, and partial sums of a few megabytes
_INT32 = 2**31


@triton.jit
def _program(pid, width, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Strips (BLOCK_P, 1) and channels (1, BLOCK_D) of one program, past the last ones too."""
    blocks_d = tl.cdiv(width, BLOCK_D)
    place = pid // blocks_d * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return place, d


@triton.jit
def _coordinates(place, t, h, w, STRIP: tl.constexpr, WIDE: tl.constexpr):
    """Sample, t, h and the first w of each strip of a (t, h, w) grid; int64 where offsets need it (WIDE)."""
    across = tl.cdiv(w, STRIP)
    at_w = place % across * STRIP
    row = place // across
    at_h = row % h
    row = row // h
    at_t = row % t
    sample = row // t
    if WIDE:
        sample, at_t, at_h, at_w = sample.to(tl.int64), at_t.to(tl.int64), at_h.to(tl.int64), at_w.to(tl.int64)
    return sample, at_t, at_h, at_w


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """COUNT sums, each (BLOCK_P, BLOCK_D) float32, all 0: a tuple, so that each lives in registers of its own."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([BLOCK_P, BLOCK_D], tl.float32),)
    return sums


@triton.jit
def _taps(ptr, channels, mask, KW: tl.constexpr):
    """One row of taps: KW tensors of what `ptr` and `mask` broadcast to, float32; `ptr` (kw, C) at the row's start."""
    taps = ()
    for k in tl.static_range(KW):
        taps = taps + (tl.load(ptr + k * channels, mask=mask, other=0.0),)
    return taps


@triton.jit
def _forward_kernel(
    x_ptr,
    table_ptr,
    y_ptr,
    x_batch,
    strips,
    t_in,
    h_in,
    w_in,
    t_out,
    h_out,
    w_out,
    width,
    channels,
    X_TOKEN: tl.constexpr,
    ST: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y[p] = sum over taps k of x[p * stride + k - K // 2] * weight[k]; a strip holds STRIP places of y.

    The loop over rows of taps stays a loop, for small code and few registers, but for strips of one place: those have
    little else to do while they wait for memory.
    """
    place, d = _program(tl.program_id(0), width, BLOCK_P, BLOCK_D)
    sample, t, h, w = _coordinates(place, t_out, h_out, w_out, STRIP, WIDE)
    inside, known = place < strips, d < width
    sums = _zeros(STRIP, BLOCK_P, BLOCK_D)
    x_ptr += sample * x_batch + d
    table_ptr += d % channels
    for row in tl.range(KT * KH, loop_unroll_factor=KT * KH if STRIP == 1 else 1):
        a, e = row // KH, row % KH
        at_t = t * ST + (a - KT // 2)
        at_h = h * SH + (e - KH // 2)
        at_w = w * SW - KW // 2
        ok = inside & known & (at_t >= 0) & (at_t < t_in) & (at_h >= 0) & (at_h < h_in)
        line = x_ptr + ((at_t * h_in + at_h) * w_in + at_w) * X_TOKEN
        taps = _taps(table_ptr + row * KW * channels, channels, known, KW)
        for j in tl.static_range((STRIP - 1) * SW + KW):
            seen = ok & (at_w + j < w_in)
            if j < KW // 2:
                seen = seen & (at_w + j >= 0)
            value = tl.load(line + j * X_TOKEN, mask=seen, other=0.0).to(tl.float32)
            for i in tl.static_range(STRIP):
                if j - i * SW >= 0 and j - i * SW < KW:
                    sums = sums[:i] + (tl.fma(value, taps[j - i * SW], sums[i]),) + sums[i + 1 :]
    y_ptr += (((sample * t_out + t) * h_out + h) * w_out + w) * width + d
    for i in tl.static_range(STRIP):
        tl.store(y_ptr + i * width, sums[i].to(y_ptr.dtype.element_ty), mask=inside & known & (w + i < w_out))


@triton.jit
def _grad_input_kernel(
    grad_ptr,
    table_ptr,
    dx_ptr,
    grad_batch,
    strips,
    t_in,
    h_in,
    w_in,
    t_out,
    h_out,
    w_out,
    width,
    channels,
    GRAD_TOKEN: tl.constexpr,
    ST: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx[p] = sum of grad[q] * weight[k] over all q, k with q * stride + k - K // 2 = p; STRIP places of dx.

    Along T and H only the taps that can meet a place are visited: k = (p + K // 2) % stride and every stride-th
    after it. Along W the strip starts at a multiple of the stride, and so the same is known in advance.
    """
    FIRST: tl.constexpr = -(KW // 2 // SW)  # columns of grad that a strip sees, from the one below its start
    LAST: tl.constexpr = (STRIP - 1 + KW // 2) // SW
    place, d = _program(tl.program_id(0), width, BLOCK_P, BLOCK_D)
    sample, t, h, w = _coordinates(place, t_in, h_in, w_in, STRIP, WIDE)
    inside, known = place < strips, d < width
    sums = _zeros(STRIP, BLOCK_P, BLOCK_D)
    grad_ptr += sample * grad_batch + d
    table_ptr += d % channels
    ROWS: tl.constexpr = (KH + SH - 1) // SH
    for row in tl.range((KT + ST - 1) // ST * ROWS, loop_unroll_factor=1):
        m, n = row // ROWS, row % ROWS
        a = (t + KT // 2) % ST + m * ST
        e = (h + KH // 2) % SH + n * SH
        at_t = (t + KT // 2) // ST - m
        at_h = (h + KH // 2) // SH - n
        at_w = w // SW + FIRST
        met = inside & known & (a < KT) & (e < KH)
        ok = met & (at_t >= 0) & (at_t < t_out) & (at_h >= 0) & (at_h < h_out)
        line = grad_ptr + ((at_t * h_out + at_h) * w_out + at_w) * GRAD_TOKEN
        taps = _taps(table_ptr + (a * KH + e) * KW * channels, channels, met, KW)
        for j in tl.static_range(LAST - FIRST + 1):
            seen = ok & (at_w + j < w_out)
            if FIRST + j < 0:
                seen = seen & (at_w + j >= 0)
            value = tl.load(line + j * GRAD_TOKEN, mask=seen, other=0.0).to(tl.float32)
            for i in tl.static_range(STRIP):
                if i + KW // 2 - (FIRST + j) * SW >= 0 and i + KW // 2 - (FIRST + j) * SW < KW:
                    tap = taps[i + KW // 2 - (FIRST + j) * SW]
                    sums = sums[:i] + (tl.fma(value, tap, sums[i]),) + sums[i + 1 :]
    dx_ptr += (((sample * t_in + t) * h_in + h) * w_in + w) * width + d
    for i in tl.static_range(STRIP):
        tl.store(dx_ptr + i * width, sums[i].to(dx_ptr.dtype.element_ty), mask=inside & known & (w + i < w_in))


@triton.jit
def _grad_weight_kernel(
    x_ptr,
    grad_ptr,
    partial_ptr,
    x_batch,
    grad_batch,
    strips,
    chunk,
    t_in,
    h_in,
    w_in,
    t_out,
    h_out,
    w_out,
    width,
    X_TOKEN: tl.constexpr,
    GRAD_TOKEN: tl.constexpr,
    ST: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """partial[program, k] = sum over the program's places p of grad[p] * x[p * stride + k - K // 2].

    A program goes through `chunk` strips of grad (a multiple of BLOCK_P), BLOCK_P at a time, with one sum for each tap.
    """
    blocks_d = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0) // blocks_d
    first_d = tl.program_id(0) % blocks_d * BLOCK_D
    d = first_d + tl.arange(0, BLOCK_D)[None, :]
    sums = _zeros(KT * KH * KW, BLOCK_P, BLOCK_D)
    for start in range(0, chunk, BLOCK_P):
        place = program * chunk + start + tl.arange(0, BLOCK_P)[:, None]
        sample, t, h, w = _coordinates(place, t_out, h_out, w_out, STRIP, WIDE)
        inside = (place < strips) & (d < width)
        own = grad_ptr + sample * grad_batch + ((t * h_out + h) * w_out + w) * GRAD_TOKEN + d
        grads = ()
        for i in tl.static_range(STRIP):
            value = tl.load(own + i * GRAD_TOKEN, mask=inside & (w + i < w_out), other=0.0)
            grads = grads + (value.to(tl.float32),)
        for row in tl.static_range(KT * KH):
            at_t = t * ST + (row // KH - KT // 2)
            at_h = h * SH + (row % KH - KH // 2)
            at_w = w * SW - KW // 2
            ok = inside & (at_t >= 0) & (at_t < t_in) & (at_h >= 0) & (at_h < h_in)
            line = x_ptr + sample * x_batch + ((at_t * h_in + at_h) * w_in + at_w) * X_TOKEN + d
            for j in tl.static_range((STRIP - 1) * SW + KW):
                seen = ok & (at_w + j < w_in)
                if j < KW // 2:
                    seen = seen & (at_w + j >= 0)
                value = tl.load(line + j * X_TOKEN, mask=seen, other=0.0).to(tl.float32)
                for n in tl.static_range(row * KW, row * KW + KW):  # taps of the row
                    if j >= n - row * KW and (j - n + row * KW) % SW == 0 and (j - n + row * KW) // SW < STRIP:
                        sums = sums[:n] + (tl.fma(value, grads[(j - n + row * KW) // SW], sums[n]),) + sums[n + 1 :]
    flat_d = first_d + tl.arange(0, BLOCK_D)  # the program's channels again, on one axis
    for n in tl.static_range(KT * KH * KW):
        to = partial_ptr + (program * KT * KH * KW + n) * width + flat_d
        tl.store(to, tl.sum(sums[n], axis=0), mask=flat_d < width)


def _token_stride(x: Tensor) -> int:
    """Elements from one token of x (B, T, H, W, D) to the next; the grid must lie regularly in memory."""
    _, _, height, width, depth = x.shape
    steps = {x.stride(axis) // inner for axis, inner in ((3, 1), (2, width), (1, height * width)) if x.shape[axis] > 1}
    assert x.dtype in DTYPES and x.stride(4) == 1 and len(steps) <= 1, (x.dtype, x.shape, x.stride())
    token = steps.pop() if steps else depth
    for axis, inner in ((3, 1), (2, width), (1, height * width)):
        assert x.shape[axis] == 1 or x.stride(axis) == inner * token, (x.shape, x.stride())
    return token


def _wide(*tensors: Tensor) -> bool:
    """Whether an offset into one of the tensors needs int64."""
    return any(sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) >= _INT32 for x in tensors)


def _table(weight: Tensor) -> Tensor:
    """weight (C, 1, kt, kh, kw) -> (kt * kh * kw, C) float32 contiguous, so that neighbours read neighbours."""
    flat = weight.flatten(1).t()
    return torch.empty(flat.shape, dtype=torch.float32, device=weight.device).copy_(flat)


def _strip(size: int, multiple: int) -> int:
    """Places of a strip along an axis of `size`: a multiple of `multiple`, with the least standing past the end."""
    lengths = [n for n in _STRIPS if n % multiple == 0] or [multiple]
    return min(lengths, key=lambda n: (-(-size // n) * n, -n))


def _block(width: int, elements: int) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_D) of a program with `elements` in each of its tensors."""
    channels = 64 if width % 64 == 0 else 32
    return elements // channels, channels


def _forward_strip(size: int, stride: int, taps: int) -> int:
    """Places of a strip of T', H', W' places; 1 where neighbours share no taps, for more programs at once."""
    return _strip(size, 1) if stride < taps else 1


def pooled_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """(T, H, W) -> (T', H', W') with padding k // 2."""
    return tuple((n + k // 2 * 2 - k) // s + 1 for n, k, s in zip(size, kernel, stride, strict=True))


@triton_op("maskfeat::pooling_forward", mutates_args=())
def forward(x: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    """Depthwise convolution with padding k // 2, without bias.

    Args:
        x: (B, T, H, W, D) float32, bfloat16 or float16. Tokens may lie apart (a slice of a fused projection) and
            samples too (a class token in front), but evenly.
        weight: (C, 1, kt, kh, kw) of any dtype; k odd; D = G * C.
        stride: (st, sh, sw).

    Returns:
        (B, T', H', W', D) contiguous, of x's dtype; summed in float32.
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
    wrap_triton(_forward_kernel)[grid](
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
    """Gradient of `forward` with respect to x; every place gathers, so that runs repeat bit for bit.

    Args:
        grad: (B, T', H', W', D), laid out as `forward`'s x may be.
        weight: (C, 1, kt, kh, kw), as given to `forward`.
        stride: (st, sh, sw).
        size: (T, H, W) of x.

    Returns:
        (B, T, H, W, D) contiguous, of grad's dtype; summed in float32.
    """
    batch, *out, width = grad.shape
    channels, _, *kernel = weight.shape
    assert pooled_size(size, kernel, stride) == tuple(out), (grad.shape, weight.shape, stride, size)
    dx = torch.empty((batch, *size, width), dtype=grad.dtype, device=grad.device)
    strip = _strip(size[2], stride[2])
    block_p, block_d = _block(width, _THREADS * _LOAD_BYTES // grad.element_size())
    strips = batch * size[0] * size[1] * triton.cdiv(size[2], strip)
    grid = (triton.cdiv(strips, block_p) * triton.cdiv(width, block_d),)
    wrap_triton(_grad_input_kernel)[grid](
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
    """Gradient of `forward` with respect to the weight; sums in a fixed order, so that runs repeat bit for bit.

    Args:
        x: (B, T, H, W, D), as given to `forward`.
        grad: (B, T', H', W', D), laid out as x may be.
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
    block_p, block_d = _block(width, _THREADS * 4 // x.element_size())  # few channels a thread: each has all its sums
    strips = batch * out[0] * out[1] * triton.cdiv(out[2], strip)
    blocks_d = triton.cdiv(width, block_d)
    chunk = max(triton.cdiv(strips, max(_PROGRAMS // blocks_d, 1) * block_p), 1) * block_p
    programs = triton.cdiv(strips, chunk)
    partial = torch.empty((programs, math.prod(kernel), width), dtype=torch.float32, device=x.device)
    wrap_triton(_grad_weight_kernel)[(programs * blocks_d,)](
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
