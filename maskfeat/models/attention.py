"""Pooling attention with decomposed relative positions (MViTv2, Li et al., CVPR 2022, section 4.1).

The relative positions are folded into queries and keys, so that plain scaled-dot-product kernels apply:

    (q s) . k + q . R_t[dt] + q . R_h[dh] + q . R_w[dw]  =  [q s, q.R_t, q.R_h, q.R_w] . [k, 1_t, 1_h, 1_w]

where q . R_t has one number for every time step of the keys and 1_t marks the time step at which a key stands.
Exact, and nothing of the size of the scores is ever stored (the idea of FlashBias, arXiv 2505.12044).

Shape legend: B samples, G heads, N tokens (class token first where there is one), C channels of one head,
grid = ([T,] H, W), L rows of a table of relative positions.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskfeat.models.base import conv_grid, token_parameter
from maskfeat.models.layers import CONV, layer_norm

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


def relative_scores(q: Tensor, tables: Sequence[Tensor], grid: Sequence[int], axes: Sequence[int]) -> Tensor:
    """q (B, G, N, C) without prefix, tables (queries, keys, C) for each of `axes` -> (B, G, N, sum of keys)."""
    batch, heads, num, channels = q.shape
    letters = "xyz"[: len(grid)]
    on_grid = q.reshape(batch, heads, *grid, channels)
    parts = [
        torch.einsum(f"bg{letters}c,{letters[axis]}kc->bg{letters}k", on_grid, table)
        for axis, table in zip(axes, tables, strict=True)
    ]
    return torch.cat(parts, dim=-1).reshape(batch, heads, num, -1)


def folded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    places: Tensor,
    grid: Sequence[int],
    axes: Sequence[int],
) -> Tensor:
    """Attention with relative positions along `axes` of the query grid.

    Args:
        q: (B, G, prefix + prod(grid), C), unscaled.
        k, v: (B, G, Nk, C).
        tables: for each axis (queries, keys, C), see `relative_index`.
        places: (Nk, sum of keys), see `key_places`.

    Returns:
        (B, G, prefix + prod(grid), C)
    """
    channels = q.shape[-1]
    prefix = q.shape[2] - math.prod(grid)
    extra = relative_scores(q[:, :, prefix:], tables, grid, axes)
    pad = -(channels + extra.shape[-1]) % _ALIGN
    q_wide = torch.cat([q * channels**-0.5, F.pad(extra.to(q.dtype), (0, pad, prefix, 0))], dim=-1)
    marks = F.pad(places.to(k.dtype), (0, pad)).expand(*k.shape[:2], -1, -1)
    k_wide = torch.cat([k, marks], dim=-1)
    v_wide = F.pad(v, (0, q_wide.shape[-1] - channels))
    return F.scaled_dot_product_attention(q_wide, k_wide, v_wide, scale=1.0)[..., :channels]


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

    def _pool(self, x: Tensor, pool: nn.Module | None, norm: nn.Module | None) -> Tensor:
        """x (B, N, G, C) -> (B, G, N', C): depthwise convolution over the grid, then LayerNorm over C."""
        if pool is None or norm is None:
            return x.transpose(1, 2)
        batch, _, heads, channels = x.shape
        patches = x[:, self.prefix :].transpose(1, 2).reshape(batch * heads, *self.grid, channels)
        pooled = pool(patches.movedim(-1, 1)).movedim(1, -1)
        pooled = pooled.reshape(batch, heads, -1, channels)
        if self.prefix:
            pooled = torch.cat([x[:, : self.prefix].transpose(1, 2), pooled], dim=2)
        return norm(pooled)

    def _tables(self) -> list[Tensor]:
        """For each axis with relative positions its table spread to (queries, keys, C)."""
        tables = []
        for axis in self.axes:
            name = self._names[axis]
            tables.append(getattr(self, f"rel_pos_{name}")[getattr(self, f"_index_{name}")])
        return tables

    def forward(self, x: Tensor) -> Tensor:
        """x (B, prefix + prod(grid), D) -> (B, prefix + prod(q_grid), D)."""
        batch, num, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, num, 3, self.num_heads, self.head_width).unbind(2)
        q = self._pool(q, self.pool_q, self.norm_q)
        k = self._pool(k, self.pool_k, self.norm_k)
        v = self._pool(v, self.pool_v, self.norm_v)
        if self.axes:
            out = folded_attention(q, k, v, self._tables(), self._key_places, self.q_grid, self.axes)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        if self.residual_pooling:
            patches = out[:, :, self.prefix :] + q[:, :, self.prefix :]
            out = torch.cat([out[:, :, : self.prefix], patches], dim=2) if self.prefix else patches
        out = out.transpose(1, 2).reshape(batch, out.shape[2], -1)
        return self.dropout(self.proj(out))
