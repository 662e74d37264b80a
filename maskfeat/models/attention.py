"""Pooling attention with decomposed relative positions (MViTv2, Li et al., CVPR 2022, section 4.1).

The relative positions are folded into queries and keys, so that plain scaled-dot-product kernels apply:

    (q s) . k + q . R_t[dt] + q . R_h[dh] + q . R_w[dw]  =  [q s, q.R_t, q.R_h, q.R_w] . [k, 1_t, 1_h, 1_w]

where q . R_t has one number for every time step of the keys and 1_t marks the time step at which a key stands.
Exact, and nothing of the size of the scores is ever stored (the idea of FlashBias, arXiv 2505.12044).

Shape legend: B samples, N tokens (class token first where there is one), G heads, C channels of one head,
grid = ([T,] H, W), L rows of a table of relative positions. Heads stand side by side, as the linear layers write them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskfeat.models.base import conv_grid, token_parameter
from maskfeat.models.layers import CONV, layer_norm
from maskfeat.models.pooling import pool_tokens

AXES = ("t", "h", "w")
_ALIGN = 8  # head widths that fast kernels take


def relative_index(queries: int, keys: int) -> Tensor:
    """(queries, keys) int64: row of the table for each pair along one axis.

    Where the two lengths differ, the coarser one is stretched to the finer (MViTv2's published code).
    """
    q_step, k_step = max(keys / queries, 1.0), max(queries / keys, 1.0)
    q_at = torch.arange(queries, dtype=torch.float64)[:, None] * q_step
    k_at = torch.arange(keys, dtype=torch.float64)[None, :] * k_step
    return (q_at - k_at + (keys - 1) * k_step).long()


def table_rows(queries: int, keys: int) -> int:
    """Rows of a table of relative positions along one axis."""
    return 2 * max(queries, keys) - 1


def key_places(grid: Sequence[int], prefix: int, axes: Sequence[int]) -> Tensor:
    """(prefix + N, R) float32: for each key a 1 at its place along each of `axes`; rows of the prefix are zero."""
    places = []
    for axis in axes:
        one_hot = torch.eye(grid[axis])
        shape = [1] * len(grid) + [grid[axis]]
        shape[axis] = grid[axis]
        places.append(one_hot.reshape(shape).expand(*grid, -1).reshape(math.prod(grid), -1))
    return F.pad(torch.cat(places, dim=-1), (0, 0, prefix, 0))


class _WideQueries(torch.autograd.Function):
    """See `wide_queries`. Nothing but its output is kept for the gradients: the queries stand in it."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, grid: tuple[int, ...], axes: tuple[int, ...], width: int, *tables: Tensor
    ) -> Tensor:
        prefix = q.shape[1] - math.prod(grid)
        sizes = [q.shape[-1], *(table.shape[1] for table in tables)]
        wide = q.new_empty(*q.shape[:-1], width)
        places = wide.split([*sizes, width - sum(sizes)], dim=-1)
        places[0].copy_(q)
        on_grid = q[:, prefix:].unflatten(1, grid)
        for axis, table, place in zip(axes, tables, places[1:-1], strict=True):
            place[:, :prefix] = 0
            place[:, prefix:] = torch.einsum(_per_axis("cs", axis, grid), on_grid, table.to(q.dtype)).flatten(
                1, len(grid)
            )
        places[-1].zero_()
        ctx.save_for_backward(wide, *tables)
        ctx.settings = grid, axes, prefix, sizes
        return wide

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, *tables = ctx.saved_tensors
        grid, axes, prefix, sizes = ctx.settings
        of_q, *of_scores = grad[..., : sum(sizes)].split(sizes, dim=-1)
        of_q = of_q.clone(memory_format=torch.contiguous_format)
        q = wide[:, prefix:, :, : sizes[0]].unflatten(1, grid)
        of_tables = []
        for axis, table, of_score in zip(axes, tables, of_scores, strict=True):
            on_grid = of_score[:, prefix:].unflatten(1, grid)
            of_q[:, prefix:] += torch.einsum(_per_axis("sc", axis, grid), on_grid, table.to(grad.dtype)).flatten(
                1, len(grid)
            )
            of_tables.append(torch.einsum(_of_table(axis, grid), on_grid, q).to(table.dtype))
        return of_q, None, None, None, *of_tables


def _per_axis(change: str, axis: int, grid: Sequence[int]) -> str:
    """Einsum of (B, *grid, G, C or S) with a table (queries, S, C), S = keys: "cs" makes C into S, "sc" S into C."""
    letters = "xyz"[: len(grid)]
    return f"b{letters}g{change[0]},{letters[axis]}sc->b{letters}g{change[1]}"


def _of_table(axis: int, grid: Sequence[int]) -> str:
    """Einsum of (B, *grid, G, S) with (B, *grid, G, C) for the gradient of a table (queries, S, C)."""
    letters = "xyz"[: len(grid)]
    return f"b{letters}gs,b{letters}gc->{letters[axis]}sc"


def wide_queries(q: Tensor, tables: Sequence[Tensor], grid: Sequence[int], axes: Sequence[int], width: int) -> Tensor:
    """Queries with their relative scores q . R along each of `axes` beside them.

    Args:
        q: (B, prefix + prod(grid), G, C).
        tables: for each axis (queries, keys, C), see `relative_index`.
        width: of the result; what is left over is zero, and so are the scores of the prefix.

    Returns:
        (B, prefix + prod(grid), G, width)
    """
    return _WideQueries.apply(q, tuple(grid), tuple(axes), width, *tables)


class _AddQueries(torch.autograd.Function):
    """The attention's output and the queries of places: residual pooling (MViTv2, section 4.1)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, prefix: int, channels: int) -> Tensor:
        """out, q (B, prefix + N, G, C or more), of which the first `channels` count -> (B, prefix + N, G, C)."""
        ctx.prefix, ctx.padding = prefix, [x.shape[-1] - channels for x in (out, q)]
        total = out[..., :channels].contiguous()
        total[:, prefix:] += q[:, prefix:, :, :channels]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_out, of_q = (F.pad(grad, (0, padding)) for padding in ctx.padding)
        of_q = of_q.clone() if ctx.padding[1] == 0 else of_q
        of_q[:, : ctx.prefix] = 0
        return of_out, of_q, None, None


def folded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    places: Tensor,
    grid: Sequence[int],
    axes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Attention with relative positions along `axes` of the query grid.

    Args:
        q: (B, prefix + prod(grid), G, C), unscaled.
        k, v: (B, Nk, G, C).
        tables: for each axis (queries, keys, C), see `relative_index`.
        places: (Nk, sum of keys), see `key_places`.

    Returns:
        the output and the queries, both (B, prefix + prod(grid), G, C or more): what follows the first C channels of
        either is of no use to the caller, and costs less to pass on than to cut off.
    """
    channels, keys = q.shape[-1], places.shape[-1]
    padding = -(channels + keys) % _ALIGN
    q_wide = wide_queries(q, tables, grid, axes, channels + keys + padding)
    # Keys are few: they are what is scaled and spread.
    marks = F.pad(places.to(k.dtype), (0, padding))[:, None].expand(len(k), -1, k.shape[2], -1)
    k_wide = torch.cat([k * channels**-0.5, marks], dim=-1)
    v_wide = F.pad(v, (0, keys + padding))
    return _attention(q_wide, k_wide, v_wide, scale=1.0), q_wide


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """q (B, N, G, C), k, v (B, Nk, G, C) -> (B, N, G, C)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


class PoolingAttention(nn.Module):
    """Multi-head pooling attention of one MViTv2 block.

    Args:
        width: D in and out.
        num_heads: G.
        grid: tokens along ([T,] H, W) that come in.
        kernel: pooling kernel along the axes of `grid`.
        stride_q, stride_kv: pooling strides of queries, and of keys and values.
        class_token: whether token 0 stands for no place; it skips pooling and relative positions.
        relative_space, relative_time: which axes carry relative positions.
        residual_pooling: whether the pooled query is added to the output (MViTv2, section 4.1).
    """

    recomputable = ("project", "pooled", "joined")

    pool_q: nn.Module | None
    pool_k: nn.Module | None
    pool_v: nn.Module | None
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    norm_v: nn.Module | None
    _key_places: Tensor

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        grid: Sequence[int],
        kernel: Sequence[int],
        stride_q: Sequence[int],
        stride_kv: Sequence[int],
        qkv_bias: bool = True,
        class_token: bool = True,
        relative_space: bool = True,
        relative_time: bool = True,
        relative_zero_init: bool = False,
        residual_pooling: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.grid, self.prefix = tuple(grid), int(class_token)
        self.residual_pooling = residual_pooling
        padding = tuple(k // 2 for k in kernel)
        self.q_grid = conv_grid(grid, kernel, stride_q, padding)
        self.kv_grid = conv_grid(grid, kernel, stride_kv, padding)
        names = AXES[-len(grid) :]
        wanted = {"t": relative_time, "h": relative_space, "w": relative_space}
        self.axes = tuple(i for i, name in enumerate(names) if wanted[name])
        # Released order of the names: h, w, t.
        for name in sorted((names[i] for i in self.axes), key="hwt".index):
            axis = names.index(name)
            table = token_parameter(table_rows(self.q_grid[axis], self.kv_grid[axis]), self.head_width)
            if relative_zero_init:
                nn.init.zeros_(table)
            self.register_parameter(f"rel_pos_{name}", table)
        for axis in self.axes:
            index = relative_index(self.q_grid[axis], self.kv_grid[axis])
            self.register_buffer(f"_index_{names[axis]}", index, persistent=False)
        if self.axes:
            places = key_places(self.kv_grid, self.prefix, self.axes)
            self.register_buffer("_key_places", places, persistent=False)
        self._names = names
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        for which, stride in (("q", stride_q), ("k", stride_kv), ("v", stride_kv)):
            if math.prod(kernel) == 1 and math.prod(stride) == 1:
                self.register_module(f"pool_{which}", None)
                self.register_module(f"norm_{which}", None)
                continue
            channels = self.head_width
            pool = CONV[len(grid)](
                channels, channels, tuple(kernel), tuple(stride), padding, groups=channels, bias=False
            )
            self.register_module(f"pool_{which}", pool)
            self.register_module(f"norm_{which}", layer_norm(channels))
        self.dropout = nn.Dropout(dropout)

    def project(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """x (B, N, D) -> queries, keys and values side by side (B, N, 3 D)."""
        return self.qkv(x if norm is None else norm(x))

    def pooled(self, x: Tensor) -> list[Tensor]:
        """x (B, N, 3 D) -> queries, keys and values (B, N', G, C): pooled over the grid, then LayerNorm over C."""
        pools = [self.pool_q, self.pool_k, self.pool_v]
        shares = list(x.chunk(3, dim=-1))
        used = [i for i, pool in enumerate(pools) if pool is not None]
        if used:
            convs = [pool for pool in pools if isinstance(pool, nn.Conv2d | nn.Conv3d)]
            tokens = x if len(used) == 3 else torch.cat([shares[i] for i in used], dim=-1)
            pooled = pool_tokens(tokens, self.prefix, self.grid, [c.stride for c in convs], [c.weight for c in convs])
            for i, share in zip(used, pooled, strict=True):
                shares[i] = share
        by_head = [share.unflatten(-1, (self.num_heads, self.head_width)) for share in shares]
        norms = [self.norm_q, self.norm_k, self.norm_v]
        return [share if norm is None else norm(share).to(x.dtype) for share, norm in zip(by_head, norms, strict=True)]

    def _tables(self) -> list[Tensor]:
        """For each axis with relative positions its table spread to (queries, keys, C)."""
        tables = []
        for axis in self.axes:
            name = self._names[axis]
            tables.append(getattr(self, f"rel_pos_{name}")[getattr(self, f"_index_{name}")])
        return tables

    def joined(self, out: Tensor, q: Tensor) -> Tensor:
        """out, q (B, N', G, C or more) -> (B, N', D): residual pooling, and the heads mixed."""
        channels = self.head_width
        out = _AddQueries.apply(out, q, self.prefix, channels) if self.residual_pooling else out[..., :channels]
        return self.dropout(self.proj(out.flatten(2)))

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """x (B, prefix + prod(grid), D), to which `norm` is applied first -> (B, prefix + prod(q_grid), D)."""
        q, k, v = self.pooled(self.project(x, norm))
        if self.axes:
            out, q = folded_attention(q, k, v, self._tables(), self._key_places, self.q_grid, self.axes)
        else:
            out = _attention(q, k, v)
        return self.joined(out, q)
