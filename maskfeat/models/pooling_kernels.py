"""The Triton kernels of `pooling_triton`; see there for the shape legend.

How the work is divided: a strip is a few neighbouring positions along W whose sums are held in registers; a program
handles BLOCK_P strips and BLOCK_D channels. The strips of all samples, frames and rows are numbered consecutively.
Strips start at multiples of the stride, so that it is known at compile time which taps contribute to which positions.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, assignment"
# (Triton has no type annotations.)

import triton
import triton.language as tl


@triton.jit
def _program(pid, width, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the strips (BLOCK_P, 1) and channels (1, BLOCK_D) of a program; they may exceed the last ones."""
    blocks_d = tl.cdiv(width, BLOCK_D)
    place = pid // blocks_d * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return place, d


@triton.jit
def _coordinates(place, t, h, w, STRIP: tl.constexpr, WIDE: tl.constexpr):
    """Return sample, t, h and the first w of each strip of a (t, h, w) grid; int64 if offsets need it (WIDE)."""
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
    """Return COUNT sums (BLOCK_P, BLOCK_D) float32 of zeros, as a tuple so that each has its own registers."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([BLOCK_P, BLOCK_D], tl.float32),)
    return sums


@triton.jit
def _taps(ptr, channels, mask, KW: tl.constexpr):
    """Load a row of KW taps, float32; `ptr` points to the start of the row in a table (kw, C)."""
    taps = ()
    for k in tl.static_range(KW):
        taps = taps + (tl.load(ptr + k * channels, mask=mask, other=0.0),)
    return taps


@triton.jit
def forward_kernel(
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
    """Compute y[p] = sum over taps k of x[p * stride + k - K // 2] * weight[k]; a strip has STRIP positions of y.

    The loop over rows of taps is not unrolled, for small code and few registers, except with strips of one position,
    which have little else to do while they wait for memory.
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
def grad_input_kernel(
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
    """Compute dx[p] = sum of grad[q] * weight[k] over all q, k with q * stride + k - K // 2 = p.

    A strip has STRIP positions of dx. Along T and H only the taps that can contribute to a position are visited: k = (p
    + K // 2) % stride and every stride-th one after it. Along W the strip starts at a multiple of the stride, so that
    these taps are known at compile time.
    """
    FIRST: tl.constexpr = -(KW // 2 // SW)  # columns of grad that a strip reads, relative to its start
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
def grad_weight_kernel(
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
    """Compute partial[program, k] = sum over the program's positions p of grad[p] * x[p * stride + k - K // 2].

    A program iterates over `chunk` strips of grad (a multiple of BLOCK_P), BLOCK_P at a time, with one sum per tap.
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
    flat_d = first_d + tl.arange(0, BLOCK_D)  # the channels of the program as a vector
    for n in tl.static_range(KT * KH * KW):
        to = partial_ptr + (program * KT * KH * KW + n) * width + flat_d
        tl.store(to, tl.sum(sums[n], axis=0), mask=flat_d < width)
