"""Folded attention against the reference form, in float64."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.reference_mvit import reference_forward
from maskfeat.checkpoint.weights import resize_weight
from maskfeat.models.attention import PoolingAttention, folded_attention, key_places, relative_index, table_rows


def reference(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], grid: Sequence[int], keys: Sequence[int]
) -> Tensor:
    """softmax(q k^T / sqrt(C) + sum over axes of q . R[axis]) v with every score written out, one pair at a time."""
    prefix = q.shape[2] - math.prod(grid)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    bias = torch.zeros_like(scores)
    for i in range(math.prod(grid)):
        at_q = torch.unravel_index(torch.tensor(i), tuple(grid))
        for j in range(math.prod(keys)):
            at_k = torch.unravel_index(torch.tensor(j), tuple(keys))
            row = sum(table[at_q[axis], at_k[axis]] for axis, table in enumerate(tables))
            bias[:, :, prefix + i, prefix + j] = (q[:, :, prefix + i] * row).sum(-1)
    return (scores + bias).softmax(dim=-1) @ v


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    ("grid", "keys"),
    [((2, 4, 4), (2, 2, 2)), ((2, 3, 3), (2, 3, 3)), ((2, 2, 2), (2, 4, 4)), ((5, 4), (3, 2))],
)
def test_folding_is_exact(grid: tuple[int, ...], keys: tuple[int, ...], prefix: int) -> None:
    draw = torch.Generator().manual_seed(1)
    shape = (2, prefix + math.prod(grid), 3, 10)
    q = torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(2, prefix + math.prod(keys), 3, 10, generator=draw, dtype=torch.float64, requires_grad=True)
        for _ in "kv"
    )
    axes = tuple(range(len(grid)))
    tables = [
        torch.randn(table_rows(a, b), 10, generator=draw, dtype=torch.float64)[relative_index(a, b)].requires_grad_()
        for a, b in zip(grid, keys, strict=True)
    ]
    places = key_places(keys, prefix, axes).double()
    folded, wide = (x[..., :10] for x in folded_attention(q, k, v, tables, places, grid, axes))
    assert torch.equal(wide, q)
    expected = reference(*(x.transpose(1, 2) for x in (q, k, v)), tables, grid, keys).transpose(1, 2)
    torch.testing.assert_close(folded, expected, rtol=0, atol=1e-10)
    weight = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    mine = torch.autograd.grad((folded * weight).sum(), (q, k, v, *tables))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v, *tables))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_relative_index_by_hand() -> None:
    assert relative_index(3, 3).tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    # Keys half as dense as queries: a key's distance counts double.
    assert relative_index(4, 2).tolist() == [[2, 0], [3, 1], [4, 2], [5, 3]]
    assert relative_index(2, 4).tolist() == [[3, 2, 1, 0], [5, 4, 3, 2]]
    for queries, keys in ((8, 8), (28, 14), (14, 28), (56, 7), (5, 3)):
        index = relative_index(queries, keys)
        assert index.min() == 0 and index.max() < table_rows(queries, keys)


def test_resized_table_keeps_a_line_straight() -> None:
    line = torch.arange(13.0)[:, None].expand(13, 4)
    resized = resize_weight("blocks.0.attn.rel_pos_h", line, torch.Size((27, 4)))
    assert resized is not None and resized.shape == (27, 4)
    steps = resized[2:-2].diff(dim=0)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps))
    same = resize_weight("blocks.0.attn.rel_pos_h", line, torch.Size((13, 4)))
    assert same is not None and torch.equal(same, line)


def test_class_token_skips_pooling() -> None:
    attention = PoolingAttention(
        width=16, num_heads=2, grid=(2, 4, 4), kernel=(3, 3, 3), stride_q=(1, 2, 2), stride_kv=(1, 2, 2)
    )
    x = torch.randn(1, 33, 16)
    assert attention(x).shape == (1, 1 + 8, 16)
    moved = x.clone()
    moved[:, 0] += 1.0  # changes the class token alone
    with torch.no_grad():
        pooled, *_ = attention.pooled(attention.qkv(torch.cat([x, moved])))
    assert not torch.allclose(pooled[0, 0], pooled[1, 0])
    torch.testing.assert_close(pooled[0, 1:], pooled[1, 1:])


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(
    ("grid", "stride_q", "stride_kv"),
    [((2, 8, 8), (1, 2, 2), (1, 4, 4)), ((2, 4, 4), (1, 1, 1), (1, 1, 1)), ((8, 4), (2, 2), (4, 2))],
)
def test_a_whole_module_is_the_reference(
    grid: tuple[int, ...], stride_q: tuple[int, ...], stride_kv: tuple[int, ...], class_token: bool
) -> None:
    """Pooling, norms, relative positions and residual of clips and images, with every gradient."""
    attention = PoolingAttention(
        width=16,
        num_heads=2,
        grid=grid,
        kernel=(3,) * len(grid),
        stride_q=stride_q,
        stride_kv=stride_kv,
        class_token=class_token,
        relative_time=len(grid) == 3,
    ).double()
    x = torch.randn(2, class_token + math.prod(grid), 16, dtype=torch.float64, requires_grad=True)
    out, expected = attention(x), reference_forward(attention, x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    leaves, upstream = [x, *attention.parameters()], torch.randn_like(out)
    mine = torch.autograd.grad(out, leaves, upstream)
    theirs = torch.autograd.grad(expected, leaves, upstream)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
