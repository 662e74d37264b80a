"""The Triton pooling kernels: under Triton's interpreter, compiled without a GPU, and on a GPU where there is one.

Triton decides when a kernel is defined whether it is interpreted, so the interpreted tests run in a process of their
own (`test_interpreted`), which collects this file once more with TRITON_INTERPRET set.
"""

import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton")
pooling = pytest.importorskip("maskfeat.models.pooling_triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="run by test_interpreted")
compiled = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted")

# (B, (T, H, W), heads, channels of a head, kernel, stride)
CASES = {
    "stride_1": (2, (3, 5, 9), 2, 12, (3, 3, 3), (1, 1, 1)),
    "strips_end_evenly": (1, (2, 4, 14), 1, 24, (3, 3, 3), (1, 1, 1)),
    "stride_2_even": (1, (2, 6, 10), 2, 24, (3, 3, 3), (1, 2, 2)),
    "stride_2_odd": (2, (3, 7, 11), 1, 40, (3, 3, 3), (1, 2, 2)),
    "stride_2_in_time": (1, (5, 5, 5), 1, 12, (3, 3, 3), (2, 2, 2)),
    "stride_4": (2, (2, 9, 12), 2, 12, (3, 3, 3), (1, 4, 4)),
    "stride_8": (1, (2, 16, 24), 1, 96, (3, 3, 3), (1, 8, 8)),
    "stride_8_odd": (2, (2, 11, 13), 2, 12, (3, 3, 3), (1, 8, 8)),
    "wide_kernel": (1, (2, 6, 9), 1, 12, (1, 5, 5), (1, 4, 4)),
    "image": (2, (1, 7, 9), 2, 24, (1, 3, 3), (1, 1, 1)),
    "image_stride_2": (2, (1, 8, 7), 4, 16, (1, 3, 3), (1, 2, 2)),
    "one_column": (1, (2, 3, 1), 1, 64, (3, 3, 3), (1, 1, 1)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
    """x as the queries of a fused projection behind a class token, weight float32, grad, stride and (T, H, W)."""
    batch, size, heads, channels, kernel, stride = CASES[case]
    width, out = heads * channels, pooling.pooled_size(size, kernel, stride)
    draw = torch.Generator().manual_seed(len(case))
    fused = torch.randn(batch, 1 + math.prod(size), 3 * width, generator=draw).to(dtype)
    x = fused[:, 1:, width : 2 * width].unflatten(1, size)
    weight = torch.randn(channels, 1, *kernel, generator=draw)
    grad = torch.randn(batch, 1 + math.prod(out), width, generator=draw).to(dtype)[:, 1:].unflatten(1, out)
    return x, weight, grad, stride, size


def reference(x: Tensor, weight: Tensor, grad: Tensor, stride: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dw by conv3d and its gradient in float64, from the values as they were rounded to x's dtype."""
    heads = x.shape[-1] // len(weight)
    padding, wide = [k // 2 for k in weight.shape[2:]], weight.double().repeat(heads, 1, 1, 1, 1)
    x, grad = x.double().movedim(-1, 1), grad.double().movedim(-1, 1)
    y = F.conv3d(x, wide, None, stride, padding, 1, len(wide))
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad, x, wide, None, stride, padding, [1, 1, 1], False, [0, 0, 0], len(wide), [True, True, False]
    )
    return y.movedim(1, -1), dx.movedim(1, -1), dw.unflatten(0, (heads, -1)).sum(0)


def assert_rounded(actual: Tensor, expected: Tensor, size: float = 1.0) -> None:
    """Equal up to one rounding to the dtype (half a unit in the last place) and float32 sums of terms of `size`."""
    half = torch.finfo(actual.dtype).eps / 2
    torch.testing.assert_close(actual.double(), expected, rtol=1.01 * half, atol=2e-5 * size)


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_matches_conv3d(case: str) -> None:
    x, weight, grad, stride, size = make(case, torch.float32)
    y, dx, dw = reference(x, weight, grad, stride)
    mine = pooling.forward(x, weight, stride)
    assert mine.is_contiguous() and mine.dtype == x.dtype
    assert_rounded(mine, y)
    assert_rounded(pooling.grad_input(grad, weight, stride, size), dx)
    assert_rounded(pooling.grad_weight(x, grad, weight.shape, stride), dw, size=5)


@interpreted
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["stride_1", "stride_2_odd", "image"])
def test_half_precision_rounds_once(case: str, dtype: str) -> None:
    """Products and sums are float32, so that only the result is rounded."""
    x, weight, grad, stride, size = make(case, DTYPES[dtype])
    y, dx, dw = reference(x, weight, grad, stride)
    mine = pooling.forward(x, weight, stride)
    assert mine.dtype == x.dtype
    assert_rounded(mine, y)
    assert_rounded(pooling.grad_input(grad, weight, stride, size), dx)
    dw_mine = pooling.grad_weight(x, grad, weight.shape, stride)
    assert dw_mine.dtype == torch.float32
    assert_rounded(dw_mine, dw, size=5)


@interpreted
def test_weights_in_half_precision() -> None:
    x, weight, grad, stride, size = make("stride_2_even", torch.bfloat16)
    weight = weight.bfloat16()
    y, dx, _ = reference(x, weight, grad, stride)
    assert_rounded(pooling.forward(x, weight, stride), y)
    assert_rounded(pooling.grad_input(grad, weight, stride, size), dx)


@interpreted
def test_many_programs_share_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """More and fewer partial sums than by default, with a last program that has less to do, and the same bits twice."""
    x, weight, grad, stride, _ = make("stride_1", torch.float32)
    _, _, expected = reference(x, weight, grad, stride)
    for programs in (1, 3, 5, 10**6):
        monkeypatch.setattr(pooling, "_PROGRAMS", programs)
        first = pooling.grad_weight(x, grad, weight.shape, stride)
        assert_rounded(first, expected, size=5)
        assert torch.equal(first, pooling.grad_weight(x, grad, weight.shape, stride))


@interpreted
def test_offsets_past_int32() -> None:
    """Two samples 2**31 elements apart: most of the memory is never touched."""
    size, width = (1, 3, 5), 12
    x = torch.empty(2**31 + 3 * 5 * width, dtype=torch.bfloat16).as_strided((2, *size, width), (2**31, 180, 60, 12, 1))
    x.copy_(torch.randn(x.shape))
    weight = torch.randn(width, 1, 1, 3, 3)
    y, dx, dw = reference(x, weight, x, (1, 1, 1))
    assert_rounded(pooling.forward(x, weight, (1, 1, 1)), y)
    assert_rounded(pooling.grad_input(x, weight, (1, 1, 1), size), dx)
    assert_rounded(pooling.grad_weight(x, x, weight.shape, (1, 1, 1)), dw, size=5)


@interpreted
def test_layouts_that_are_refused() -> None:
    x, weight, *_ = make("stride_1", torch.float32)
    for bad in (x.transpose(2, 3), x[:, :, ::2], x.flip(-1).movedim(1, -1).contiguous().movedim(-1, 1), x.double()):
        with pytest.raises(AssertionError):
            pooling.forward(bad, weight, (1, 1, 1))


@compiled
def test_interpreted() -> None:
    """The tests above, in a process with Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= len(CASES)
