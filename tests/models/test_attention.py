"""The forms of attention against each other and against every score written out; which modules are called."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskfeat.build import build_backbone
from maskfeat.checkpoint.resizing import resize_weight
from maskfeat.config import load_config
from maskfeat.models import attention
from maskfeat.models.attention import (
    PoolingAttention,
    fast_attention,
    key_one_hots,
    reference_attention,
)
from maskfeat.models.layers import set_impl
from maskfeat.models.mvit import MViT
from maskfeat.models.relative_positions import relative_index, table_lengths, table_rows
from maskfeat.models.vit import ViT


def pair_by_pair(
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
def test_both_forms_are_exact(grid: tuple[int, ...], keys: tuple[int, ...], prefix: int) -> None:
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
    one_hots = key_one_hots(keys, prefix, axes).double()
    fast, wide = (x[..., :10] for x in fast_attention(q, k, v, tables, one_hots, grid, axes))
    assert torch.equal(wide, q)
    plain = reference_attention(q, k, v, tables, grid, keys, axes)
    expected = pair_by_pair(*(x.transpose(1, 2) for x in (q, k, v)), tables, grid, keys).transpose(1, 2)
    weight = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v, *tables))
    for found in (fast, plain):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        mine = torch.autograd.grad((found * weight).sum(), (q, k, v, *tables))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_relative_index_by_hand() -> None:
    assert relative_index(3, 3).tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    # Keys half as dense as queries: a key's distance counts double.
    assert relative_index(4, 2).tolist() == [[2, 0], [3, 1], [4, 2], [5, 3]]
    assert relative_index(2, 4).tolist() == [[3, 2, 1, 0], [5, 4, 3, 2]]
    # Neither a multiple of the other: a query's position counts 8 / 3, rounded down after the difference.
    assert relative_index(3, 8)[:, 0].tolist() == [7, 9, 12]
    assert [table_rows(3, 3), table_rows(4, 2), table_rows(3, 8)] == [5, 7, 15]
    for queries, keys in ((8, 8), (28, 14), (14, 28), (56, 7), (5, 3)):
        index = relative_index(queries, keys)
        assert index.min() == 0 and index.max() < table_rows(queries, keys)


def test_relative_index_is_the_published_one_also_where_a_product_is_nearly_whole() -> None:
    """Its float32 expression: at 78 queries and 10 keys, the grids of a crop of 312, float64 gives 103 other rows."""
    for queries, keys in [*itertools.product((7, 10, 14, 20, 39, 56, 78), repeat=2), (14, 5), (78, 10)]:
        scale_q, scale_k = max(keys / queries, 1.0), max(queries / keys, 1.0)
        distance = torch.arange(queries)[:, None] * scale_q - torch.arange(keys)[None, :] * scale_k
        distance += (keys - 1) * scale_k
        assert distance.dtype == torch.float32 and torch.equal(relative_index(queries, keys), distance.long())


def test_tables_have_the_published_lengths_and_are_resized_where_convolutions_round_up() -> None:
    """A grid of 39 pooled by 2 has 20 positions; PySlowFast counts 19, keeps 37 rows, and needs 39 of them."""
    assert table_lengths((20, 39, 39), (1, 2, 2), (1, 4, 4)) == (39, 37, 37)
    assert table_lengths((4, 8, 8), (2, 2, 2), (1, 1, 1)) == (7, 15, 15), "time is not divided"
    assert table_lengths((2, 2), (4, 4), (4, 4)) == (1, 1) and table_lengths((5, 5), None, None) == (9, 9)
    options = {"width": 16, "num_heads": 2, "grid": (5, 5), "kernel": (3, 3), "stride_q": (2, 2), "stride_kv": (2, 2)}
    attention = PoolingAttention(**options)  # type: ignore[arg-type]
    assert attention.q_grid == (3, 3) and attention.rel_pos_h.shape == attention.rel_pos_w.shape == (3, 8)
    table, _ = attention.tables()
    rows = torch.nn.functional.interpolate(attention.rel_pos_h.T[None], size=5, mode="linear")[0].T
    torch.testing.assert_close(table, rows[relative_index(3, 3)])
    x = torch.randn(2, 26, 16)
    found = attention(x)
    set_impl(attention, "reference")
    torch.testing.assert_close(found, attention(x), rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert attention.rel_pos_h.grad is not None and attention.rel_pos_h.grad.any()


def test_the_network_at_312_pixels_has_the_published_tables() -> None:
    with torch.device("meta"):
        backbone = build_backbone(load_config("video_ft/k400_MVITv2_L_312_40x3_FT"))
    found = [(len(block.attn.rel_pos_t), len(block.attn.rel_pos_h)) for block in backbone.blocks]
    # 78, 39, 19 and 9 queries, and keys 9 or, where block 44 pools 19 queries, 19: the larger of both.
    assert found == [(39, 155)] * 2 + [(39, 77)] * 6 + [(39, 37)] * 37 + [(39, 17)] * 3


def test_resized_table_keeps_a_line_straight() -> None:
    line = torch.arange(13.0)[:, None].expand(13, 4)
    resized = resize_weight("blocks.0.attn.rel_pos_h", line, torch.Size((27, 4)))
    assert resized is not None and resized.shape == (27, 4)
    steps = resized[2:-2].diff(dim=0)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps))
    same = resize_weight("blocks.0.attn.rel_pos_h", line, torch.Size((13, 4)))
    assert same is not None and torch.equal(same, line)


def test_a_kernel_of_one_without_strides_is_no_layer() -> None:
    attention = PoolingAttention(width=16, num_heads=2, grid=(4, 4), kernel=(1, 1), stride_q=(1, 1), stride_kv=(2, 2))
    assert attention.pool_q is attention.norm_q is None
    assert attention.pool_k is not None and attention.norm_v is not None


def test_what_has_no_stride_has_no_layer() -> None:
    attention = PoolingAttention(width=16, num_heads=2, grid=(4, 4), kernel=(3, 3), stride_q=None, stride_kv=(2, 2))
    assert attention.pool_q is attention.norm_q is None and attention.q_grid == (4, 4)
    assert attention.pool_k is not None and attention.kv_grid == (2, 2)
    x = torch.randn(2, 17, 16)
    found = attention(x)
    set_impl(attention, "reference")
    torch.testing.assert_close(found, attention(x), rtol=1e-5, atol=1e-6)


def test_class_token_skips_pooling() -> None:
    attention = PoolingAttention(
        width=16, num_heads=2, grid=(2, 4, 4), kernel=(3, 3, 3), stride_q=(1, 2, 2), stride_kv=(1, 2, 2)
    )
    assert attention.rel_pos_h.all(), "drawn, not zero, unless that is asked for"
    x = torch.randn(1, 33, 16)
    assert attention(x).shape == (1, 1 + 8, 16)
    moved = x.clone()
    moved[:, 0] += 1.0  # changes the class token alone
    with torch.no_grad():
        pooled, *_ = attention.pooled(attention.qkv(torch.cat([x, moved])))
    assert not torch.allclose(pooled[0, 0], pooled[1, 0])
    torch.testing.assert_close(pooled[0, 1:], pooled[1, 1:])


SHAPES = pytest.mark.parametrize(
    ("grid", "stride_q", "stride_kv"),
    [
        ((2, 8, 8), (1, 2, 2), (1, 4, 4)),
        ((2, 4, 4), (1, 1, 1), (1, 1, 1)),
        ((4, 4, 4), (2, 1, 1), (1, 2, 2)),
        ((8, 4), (2, 2), (4, 2)),
    ],
)
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False},
        {"residual_pooling": False},
        {"relative_space": False},
        {"relative_time": False},
        {"relative_space": False, "relative_time": False},
    ],
    ids=lambda options: "-".join(options) or "published",
)


def two_forms(
    grid: tuple[int, ...], stride_q: tuple[int, ...], stride_kv: tuple[int, ...], options: dict[str, bool]
) -> tuple[PoolingAttention, PoolingAttention]:
    """One module in the fast and in the reference form, with the same random weights."""
    given = {"relative_time": True, **options}
    given["relative_time"] &= len(grid) == 3
    kernel = (3,) * len(grid)
    fast = PoolingAttention(
        width=16, num_heads=2, grid=grid, kernel=kernel, stride_q=stride_q, stride_kv=stride_kv, **given
    )
    draw = torch.Generator().manual_seed(0)
    for parameter in fast.parameters():  # positions start out too small to be seen
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    plain = copy.deepcopy(fast)
    set_impl(plain, "reference")
    assert plain.impl == plain.pool_q.impl == "reference" and fast.impl == fast.pool_q.impl == "fast"
    return fast, plain


@OPTIONS
@SHAPES
def test_a_whole_module_is_the_reference(
    grid: tuple[int, ...], stride_q: tuple[int, ...], stride_kv: tuple[int, ...], options: dict[str, bool]
) -> None:
    """Pooling, norms, relative positions and residual of clips and images, with every gradient."""
    fast, plain = (module.double() for module in two_forms(grid, stride_q, stride_kv, options))
    x = torch.randn(2, options.get("class_token", True) + math.prod(grid), 16, dtype=torch.float64, requires_grad=True)
    out, expected = fast(x), plain(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    upstream = torch.randn_like(out)
    mine = torch.autograd.grad(out, [x, *fast.parameters()], upstream)
    theirs = torch.autograd.grad(expected, [x, *plain.parameters()], upstream)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("few_scores", [0, 2**17])
@SHAPES
def test_forms_agree_in_bfloat16(
    grid: tuple[int, ...],
    stride_q: tuple[int, ...],
    stride_kv: tuple[int, ...],
    few_scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In mixed precision the forms differ by roundings, each of them as far from float32 as the other."""
    monkeypatch.setattr(attention, "_FEW_SCORES", few_scores)
    fused, called = F.scaled_dot_product_attention, set()

    def noted(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        called.add(q.dtype)
        return fused(q, k, v, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    fast, plain = two_forms(grid, stride_q, stride_kv, {})
    x = torch.randn(2, 1 + math.prod(grid), 16, requires_grad=True)
    upstream = torch.randn_like(fast(x))

    def passes(module: PoolingAttention, enabled: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = module(x)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        return [out, *torch.autograd.grad(out.float(), [x, *module.parameters()], upstream)]

    exact = passes(fast, False)
    largest = max(grad.norm() for grad in exact[1:])  # beside it, that of the keys' bias is zero but for roundings
    for low in (passes(fast, True), passes(plain, True)):
        for found, wanted in zip(low, exact, strict=True):
            assert (found - wanted).norm() <= 0.03 * wanted.norm() + 1e-3 * largest
    assert (torch.bfloat16 in called) == (few_scores == 0)


def small_mvit() -> MViT:
    return MViT(
        clip_size=(8, 32, 32),
        width=16,
        depth=2,
        num_heads=1,
        width_mul={1: 2.0},
        head_mul={1: 2.0},
        stride_q={0: (1, 1, 1), 1: (1, 2, 2)},
        stride_kv_adaptive=(1, 4, 4),
        maskable=True,
    )


@pytest.mark.parametrize("impl", ["fast", "reference"])
def test_pooling_layers_and_norms_are_called_as_modules(impl: str) -> None:
    """Forward hooks, wrappers and counters of FLOPs see each of them once in a forward pass."""
    mvit = small_mvit()
    set_impl(mvit, impl)
    seen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for name, module in mvit.named_modules():
        if ".attn.pool_" in name or ".attn.norm_" in name:
            module.register_forward_hook(
                lambda module, given, out, name=name: seen.append((name, tuple(given[0].shape), tuple(out.shape)))
            )
    mvit.forward_tokens(torch.randn(2, 3, 8, 32, 32))
    tokens = 1 + 4 * 8 * 8
    expected = []
    for block, heads, queries, keys in ((0, 1, tokens, 1 + 4 * 2 * 2), (1, 2, 1 + 4 * 4 * 4, 1 + 4 * 4 * 4)):
        for letter, pooled in (("q", queries), ("k", keys), ("v", keys)):
            by_head = (2, pooled, heads, 16)
            expected.append((f"blocks.{block}.attn.pool_{letter}", (2, tokens, 16 * heads), (2, pooled, 16 * heads)))
            expected.append((f"blocks.{block}.attn.norm_{letter}", by_head, by_head))
    assert seen == expected


@pytest.mark.parametrize("impl", ["fast", "reference"])
@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_a_pooling_layer_can_be_replaced(letter: str, impl: str) -> None:
    """By any module from tokens to pooled tokens, such as the layer itself with an adapter beside it."""

    class Adapted(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module, scale: float) -> None:
            super().__init__()
            self.layer, self.scale = layer, scale

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(tokens) + self.scale * self.layer(tokens.roll(1, dims=-1))

    mvit = small_mvit()
    set_impl(mvit, impl)
    clip, name = torch.randn(1, 3, 8, 32, 32), f"pool_{letter}"
    with torch.no_grad():
        before = mvit.forward_tokens(clip).x
        layer = getattr(mvit.blocks[1].attn, name)
        setattr(mvit.blocks[1].attn, name, Adapted(layer, 0.0))
        assert torch.equal(mvit.forward_tokens(clip).x, before)
        setattr(mvit.blocks[1].attn, name, Adapted(layer, 1.0))
        assert not torch.allclose(mvit.forward_tokens(clip).x, before)


@pytest.mark.parametrize("build", [small_mvit, lambda: ViT(image_size=(32, 32), width=16, depth=2, num_heads=2)])
def test_a_whole_model_in_the_reference_form(build: Callable[[], MViT | ViT]) -> None:
    model = build().double()
    clip = torch.randn(2, 3, *model.clip_size, dtype=torch.float64)
    found = []
    for impl in ("fast", "reference"):
        set_impl(model, impl)
        attention = model.blocks[0].attn
        assert (attention.impl if isinstance(model, MViT) else attention.fused_attn) in (impl, impl == "fast")
        x = model.forward_tokens(clip).x
        grads = torch.autograd.grad(x.square().mean(), list(model.parameters()), allow_unused=True)
        found.append([x, *(grad for grad in grads if grad is not None)])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)
    assert not torch.equal(found[0][0], found[1][0]), "both times the same form"
    with pytest.raises(ValueError, match="impl is 'plain'"):
        set_impl(model, "plain")
