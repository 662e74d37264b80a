"""Pooling of tokens, in both forms, against PyTorch's own convolution and its gradients."""

import importlib.util
import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskfeat import models
from maskfeat.models import pooling
from maskfeat.models.pooling import conv_pool


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


@pytest.mark.parametrize("impl", ["fast", "reference"])
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
        ((2, 6, 6), (1, 4, 4), [(1, 1, 1), (1, 2, 2), (1, 3, 3)]),
        ((8, 6), (3, 3), [(1, 1), (2, 2), (4, 4)]),
    ],
)
def test_equals_convolution(
    grid: tuple[int, ...], kernel: tuple[int, ...], strides: list[tuple[int, ...]], prefix: int, impl: str
) -> None:
    draw = torch.Generator().manual_seed(0)
    channels, heads = 4, 2
    width = channels * heads
    tokens = torch.randn(2, prefix + math.prod(grid), 3 * width, generator=draw, dtype=torch.float64)
    weights = [torch.randn(channels, 1, *kernel, generator=draw, dtype=torch.float64) for _ in range(3)]
    inputs = [x.requires_grad_() for x in (tokens, *weights)]
    shares = list(zip(tokens.split(width, dim=-1), strides, weights, strict=True))
    mine = [conv_pool(share, prefix, grid, stride, weight, impl) for share, stride, weight in shares]
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


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (1, 4, 4)])
def test_halves_are_summed_in_float32(stride: tuple[int, ...]) -> None:
    tokens = torch.randn(1, 1 + 32, 8).bfloat16()
    weight = torch.randn(8, 1, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = conv_pool(tokens, 1, (2, 4, 4), stride, weight)
    assert pooled.dtype == torch.bfloat16
    exact = conv_pool(tokens.float(), 1, (2, 4, 4), stride, weight)
    torch.testing.assert_close(pooled, exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(2, 6, 6), (6, 6)])
def test_forms_agree_in_bfloat16(grid: tuple[int, ...]) -> None:
    """As in mixed precision: the forms differ by the rounding of bfloat16, forward and backward."""
    stride = (1, 2, 2)[-len(grid) :]
    tokens = torch.randn(2, 1 + math.prod(grid), 16).bfloat16().requires_grad_()
    weight = torch.randn(8, 1, *(3,) * len(grid), requires_grad=True)
    found = []
    for impl in ("fast", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            out = conv_pool(tokens, 1, grid, stride, weight, impl)
        assert out.dtype == torch.bfloat16
        found.append([out, *torch.autograd.grad(out.float().square().mean(), [tokens, weight])])
    for fast, plain in zip(*found, strict=True):
        assert fast.dtype == plain.dtype
        assert (fast - plain).float().norm() <= 0.02 * plain.float().norm()


def test_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="impl is 'slow', expected one of .'fast', 'reference'"):
        conv_pool(torch.zeros(1, 4, 8), 0, (2, 2), (1, 1), torch.zeros(8, 1, 3, 3), impl="slow")


@pytest.mark.parametrize("setting", [None, "0", "1"])
def test_kernels_have_to_be_asked_for(setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if setting is None:
        monkeypatch.delenv("MASKFEAT_TRITON", raising=False)
    else:
        monkeypatch.setenv("MASKFEAT_TRITON", setting)
    spec = importlib.util.find_spec("maskfeat.models.pooling")
    assert spec is not None and spec.loader is not None
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert (anew._triton_kernels() is not None) == (setting == "1")


@pytest.mark.slow
@pytest.mark.parametrize("asked", [False, True])
def test_what_chooses_the_kernels_is_compiled_without_a_word(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA it is within what is compiled; here it is asked for, too, and the convolutions are used."""
    pytest.importorskip("triton")
    monkeypatch.setattr(pooling, "_ASKED", asked)
    monkeypatch.setattr(pooling, "_kernels_for", lambda x, weight: None if pooling._triton_kernels() else None)
    tokens, weight = torch.randn(2, 17, 8), torch.randn(4, 1, 3, 3)
    pool = torch.compile(conv_pool, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")
        pooled = pool(tokens, 1, (4, 4), (2, 2), weight)
    torch.testing.assert_close(pooled, conv_pool(tokens, 1, (4, 4), (2, 2), weight))


def test_kernels_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_ASKED", True)
    monkeypatch.delattr(models, "pooling_triton", raising=False)
    monkeypatch.setitem(sys.modules, "maskfeat.models.pooling_triton", None)  # makes the import fail
    with pytest.raises(ValueError, match="MASKFEAT_TRITON is 1, but the Triton kernels cannot be imported"):
        pooling._triton_kernels()
