"""Token-major pooling against PyTorch's own convolution and its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskfeat.models import pooling
from maskfeat.models.pooling import pool_tokens


def by_conv(tokens: Tensor, prefix: int, grid: tuple[int, ...], stride: tuple[int, ...], weight: Tensor) -> Tensor:
    """One share (B, N, D), head by head, channels first, the prefix put back in front."""
    heads = tokens.shape[-1] // len(weight)
    conv = F.conv2d if len(grid) == 2 else F.conv3d
    padding = [k // 2 for k in weight.shape[2:]]
    pooled = []
    for head in tokens.chunk(heads, dim=-1):
        clip = head[:, prefix:].transpose(1, 2).unflatten(2, grid)
        pooled.append(conv(clip, weight, None, stride, padding, groups=len(weight)).flatten(2).transpose(1, 2))
    return torch.cat([tokens[:, :prefix], torch.cat(pooled, dim=-1)], dim=1)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    ("grid", "kernel", "strides"),
    [
        ((3, 7, 6), (3, 3, 3), [(1, 1, 1), (1, 2, 2), (1, 4, 4)]),
        ((4, 9, 9), (3, 3, 3), [(1, 2, 2), (1, 8, 8), (1, 1, 1)]),
        ((5, 4, 6), (3, 3, 3), [(2, 2, 2), (3, 1, 2), (1, 3, 1)]),
        ((2, 6, 6), (1, 3, 3), [(1, 1, 1), (1, 2, 2), (1, 3, 3)]),
        ((4, 6, 6), (5, 3, 5), [(1, 1, 1), (1, 2, 2), (2, 2, 2)]),
        ((4, 6, 6), (2, 4, 4), [(1, 1, 1), (1, 3, 3), (2, 2, 2)]),
        ((8, 6), (3, 3), [(1, 1), (2, 2), (4, 4)]),
    ],
)
def test_equals_convolution(
    grid: tuple[int, ...], kernel: tuple[int, ...], strides: list[tuple[int, ...]], prefix: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    channels, heads = 4, 2
    width = channels * heads
    tokens = torch.randn(2, prefix + math.prod(grid), 3 * width, generator=draw, dtype=torch.float64)
    weights = [torch.randn(channels, 1, *kernel, generator=draw, dtype=torch.float64) for _ in range(3)]
    inputs = [x.requires_grad_() for x in (tokens, *weights)]
    mine = pool_tokens(tokens, prefix, grid, strides, weights)
    shares = zip(tokens.split(width, dim=-1), strides, weights, strict=True)
    theirs = [by_conv(share, prefix, grid, stride, weight) for share, stride, weight in shares]
    loss_of = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in theirs]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    grads = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, loss_of, strict=True)), inputs)
        for outputs in (mine, theirs)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_halves_are_summed_in_float32() -> None:
    tokens = torch.randn(1, 1 + 32, 24)
    weights = [torch.randn(8, 1, 3, 3, 3) for _ in range(3)]
    strides = [(1, 1, 1), (1, 2, 2), (1, 4, 4)]
    low = tokens.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool_tokens(low, 1, (2, 4, 4), strides, weights)
    for mine, exact in zip(pooled, pool_tokens(low.float(), 1, (2, 4, 4), strides, weights), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, exact.bfloat16(), rtol=0, atol=0)


def test_kernels_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    try:
        pooling._kernels.cache_clear()
        assert pooling._kernels() is not None
        monkeypatch.setenv("MASKFEAT_TRITON", "0")
        pooling._kernels.cache_clear()
        assert pooling._kernels() is None
    finally:
        pooling._kernels.cache_clear()
