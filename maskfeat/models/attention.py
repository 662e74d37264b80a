"""Pooling attention with decomposed relative positions (MViTv2, Li et al., CVPR 2022, section 4.1).

`reference_attention` stores every score and adds the relative positions to them, as the paper writes it.
`fast_attention` folds the relative positions into the queries and keys, so that PyTorch's fused kernels for scaled
dot-product attention apply:

    (q s) . k + q . R_t[dt] + q . R_h[dh] + q . R_w[dw]  =  [q s, q.R_t, q.R_h, q.R_w] . [k, 1_t, 1_h, 1_w]

where q . R_t holds one score for every time step of the key grid, and 1_t is the one-hot vector of the time step of a
key. This is exact, and no tensor of the size of the scores is ever stored (the idea of FlashBias, arXiv 2505.12044).

Shape legend: B samples, N queries, Nk keys (the first `prefix` of each, such as a class token, are not on the grid), G
heads, C channels per head, D = G C, grid = ([T,] H, W), L rows of a table of relative positions. Heads stay side by
side, (B, N, G, C), as the linear layers write them. Results are of the dtype of the input; under autocast, those of
linear layers (`project`, `joined` and `forward` of `PoolingAttention`) are of its dtype.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskfeat.models.base import conv_grid, token_parameter
from maskfeat.models.layers import is_reference, layer_norm
from maskfeat.models.pooling import POOL_CONV
from maskfeat.models.relative_positions import relative_index, table_lengths, table_rows

AXES = ("t", "h", "w")
_FEW_SCORES = 2**17  # of a head: as many are stored without harm
_ALIGN = 8  # fused kernels take head widths that are multiples of this


def reference_weights(
    q: Tensor, k: Tensor, tables: Sequence[Tensor], grid: Sequence[int], key_grid: Sequence[int], axes: Sequence[int]
) -> Tensor:
    """Compute the weights of attention with relative positions as the paper writes it: softmax(q k^T / sqrt(C) + E),
    with E = q . (R_t + R_h + R_w) between tokens on the grids and 0 for the prefix.

    Args:
        q: (B, prefix + prod(grid), G, C).
        k: (B, prefix + prod(key_grid), G, C).
        tables: for each of `axes` (queries, keys, C), see `relative_index`.
        grid, key_grid: ([T,] H, W) of the queries and of the keys.
        axes: axes of the grids that have relative positions.

    Returns:
        (B, G, prefix + prod(grid), prefix + prod(key_grid))
    """
    prefix, letters = q.shape[1] - math.prod(grid), "xyz"[: len(grid)]
    q, k = (x.transpose(1, 2) for x in (q, k))  # (B, G, N, C)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    q_on_grid = q[:, :, prefix:].unflatten(2, grid)
    by_axis = scores[:, :, prefix:, prefix:].unflatten(3, key_grid).unflatten(2, grid)  # (B, G, *grid, *key_grid)
    for axis, table in zip(axes, tables, strict=True):
        relative = torch.einsum(f"bg{letters}c,{letters[axis]}kc->bg{letters}k", q_on_grid, table)
        by_axis = by_axis + relative.unflatten(-1, [n if i == axis else 1 for i, n in enumerate(key_grid)])
    scores[:, :, prefix:, prefix:] = by_axis.flatten(-len(grid)).flatten(2, -2)
    return scores.softmax(dim=-1)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    grid: Sequence[int],
    key_grid: Sequence[int],
    axes: Sequence[int],
) -> Tensor:
    """Attention as the paper writes it, with the weights and arguments of `reference_weights`.

    Args:
        v: (B, prefix + prod(key_grid), G, C).

    Returns:
        (B, prefix + prod(grid), G, C)
    """
    weights = reference_weights(q, k, tables, grid, key_grid, axes)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def key_one_hots(grid: Sequence[int], prefix: int, axes: Sequence[int]) -> Tensor:
    """Return the one-hot position of every key along each of `axes`, side by side; rows of the prefix are zero.

    Returns:
        (prefix + prod(grid), sum of the lengths of `axes`) float32.
    """
    one_hots = []
    for axis in axes:
        shape = [1] * len(grid) + [grid[axis]]
        shape[axis] = grid[axis]
        one_hots.append(torch.eye(grid[axis]).reshape(shape).expand(*grid, -1).reshape(math.prod(grid), -1))
    return F.pad(torch.cat(one_hots, dim=-1), (0, 0, prefix, 0))


class _WideQueries(torch.autograd.Function):
    """See `wide_queries`. Only the output is saved for the backward pass: the queries are its first channels."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, grid: tuple[int, ...], axes: tuple[int, ...], width: int, *tables: Tensor
    ) -> Tensor:
        prefix = q.shape[1] - math.prod(grid)
        sizes = [q.shape[-1], *(table.shape[1] for table in tables)]
        wide = q.new_empty(*q.shape[:-1], width)
        columns = wide.split([*sizes, width - sum(sizes)], dim=-1)
        columns[0].copy_(q)
        on_grid = q[:, prefix:].unflatten(1, grid)
        for axis, table, scores in zip(axes, tables, columns[1:-1], strict=True):
            scores[:, :prefix] = 0
            scores[:, prefix:] = torch.einsum(_per_axis("cs", axis, grid), on_grid, table.to(q.dtype)).flatten(
                1, len(grid)
            )
        columns[-1].zero_()
        ctx.save_for_backward(wide, *tables)
        ctx.settings = grid, axes, prefix, sizes
        return wide

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, *tables = ctx.saved_tensors
        grid, axes, prefix, sizes = ctx.settings
        grad_q, *grad_scores = grad[..., : sum(sizes)].split(sizes, dim=-1)
        grad_q = grad_q.clone(memory_format=torch.contiguous_format)
        q = wide[:, prefix:, :, : sizes[0]].unflatten(1, grid)
        grad_tables = []
        for axis, table, grad_score in zip(axes, tables, grad_scores, strict=True):
            on_grid = grad_score[:, prefix:].unflatten(1, grid)
            grad_q[:, prefix:] += torch.einsum(_per_axis("sc", axis, grid), on_grid, table.to(grad.dtype)).flatten(
                1, len(grid)
            )
            grad_tables.append(torch.einsum(_of_table(axis, grid), on_grid, q).to(table.dtype))
        return grad_q, None, None, None, *grad_tables


def _per_axis(change: str, axis: int, grid: Sequence[int]) -> str:
    """Return the einsum of (B, *grid, G, C or S) with a table (queries, S, C) along `axis`; S is the number of keys.

    Args:
        change: "cs" contracts C and returns S; "sc" contracts S and returns C.
    """
    letters = "xyz"[: len(grid)]
    return f"b{letters}g{change[0]},{letters[axis]}sc->b{letters}g{change[1]}"


def _of_table(axis: int, grid: Sequence[int]) -> str:
    """Return the einsum of (B, *grid, G, S) with (B, *grid, G, C) for the gradient of a table (queries, S, C)."""
    letters = "xyz"[: len(grid)]
    return f"b{letters}gs,b{letters}gc->{letters[axis]}sc"


def wide_queries(q: Tensor, tables: Sequence[Tensor], grid: Sequence[int], axes: Sequence[int], width: int) -> Tensor:
    """Concatenate the queries with their relative scores q . R along each of `axes`.

    Args:
        q: (B, prefix + prod(grid), G, C).
        tables: for each of `axes` (queries, keys, C), see `relative_index`.
        width: number of channels of the result; the remaining channels, and the scores of the prefix, are zero.

    Returns:
        (B, prefix + prod(grid), G, width)
    """
    return _WideQueries.apply(q, tuple(grid), tuple(axes), width, *tables)


class _AddQueries(torch.autograd.Function):
    """Residual pooling (MViTv2, section 4.1): add the queries on the grid to the output of the attention."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, prefix: int, channels: int) -> Tensor:
        """out, q (B, prefix + N, G, C or more), of which the first `channels` are used -> (B, prefix + N, G, C)."""
        ctx.prefix, ctx.padding = prefix, [x.shape[-1] - channels for x in (out, q)]
        # A copy even where `out` has no other channels: the attention's backward pass needs its output unchanged.
        total = out[..., :channels].clone(memory_format=torch.contiguous_format)
        total[:, prefix:] += q[:, prefix:, :, :channels]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, grad_q = (F.pad(grad, (0, padding)) for padding in ctx.padding)
        grad_q = grad_q.clone() if ctx.padding[1] == 0 else grad_q
        grad_q[:, : ctx.prefix] = 0
        return grad_out, grad_q, None, None


def fast_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    one_hots: Tensor,
    grid: Sequence[int],
    axes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute the same as `reference_attention` without storing the scores.

    Args:
        q: (B, prefix + prod(grid), G, C), unscaled.
        k, v: (B, Nk, G, C).
        tables: for each of `axes`, at least one, (queries, keys, C), see `relative_index`.
        one_hots: (Nk, sum of keys), see `key_one_hots`.

    Returns:
        The output and the queries, both (B, prefix + prod(grid), G, C or more). The caller must ignore everything after
        the first C channels of either; it is cheaper to pass on than to cut off.
    """
    channels, keys = q.shape[-1], one_hots.shape[-1]
    padding = -(channels + keys) % _ALIGN
    q_wide = wide_queries(q, tables, grid, axes, channels + keys + padding)
    # There are fewer keys than queries, so the keys are the ones to be scaled and widened by a copy.
    one_hots = F.pad(one_hots.to(k.dtype), (0, padding))[:, None].expand(k.shape[0], -1, k.shape[2], -1)
    k_wide = torch.cat([k * channels**-0.5, one_hots], dim=-1)
    v_wide = F.pad(v, (0, keys + padding))
    return _fused_attention(q_wide, k_wide, v_wide, scale=1.0), q_wide


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention by PyTorch's fused kernels: q (B, N, G, C), k, v (B, Nk, G, C) -> (B, N, G, C)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] * k.shape[2] <= _FEW_SCORES:
        # Two matrix products are up to four times as fast there: the fused backward pass multiplies in float32.
        weights = (q * (scale or q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return (weights @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


class PoolingAttention(nn.Module):
    """Multi-head pooling attention of one MViTv2 block.

    Args:
        width: D of the input and the output.
        num_heads: G.
        grid: ([T,] H, W) of the input tokens.
        kernel: pooling kernel along each axis of `grid`.
        stride_q, stride_kv: pooling stride of the queries, and of the keys and values; None = they are not pooled.
        table_grid: the grid for which tables of relative positions are sized, see `table_lengths`; None = `grid`.
        class_token: whether token 0 is a class token, which skips pooling and relative positions.
        relative_space, relative_time: which axes have relative positions.
        relative_zero_init: initialise the relative positions to zero.
        residual_pooling: whether to add the pooled queries to the output (MViTv2, section 4.1).
        dropout: rate on the output.
        impl: "fast" or "reference": the form of pooling and attention.
    """

    recomputable = ("project", "pooled", "joined")

    pool_q: nn.Module | None
    pool_k: nn.Module | None
    pool_v: nn.Module | None
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    norm_v: nn.Module | None
    _key_one_hots: Tensor

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        grid: Sequence[int],
        kernel: Sequence[int],
        stride_q: Sequence[int] | None,
        stride_kv: Sequence[int] | None,
        table_grid: Sequence[int] | None = None,
        qkv_bias: bool = True,
        class_token: bool = True,
        relative_space: bool = True,
        relative_time: bool = True,
        relative_zero_init: bool = False,
        residual_pooling: bool = True,
        dropout: float = 0.0,
        impl: str = "fast",
    ) -> None:
        super().__init__()
        self.impl = impl
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.grid, self.prefix = tuple(grid), int(class_token)
        self.residual_pooling = residual_pooling
        padding = tuple(k // 2 for k in kernel)
        self.q_grid, self.kv_grid = (
            tuple(grid) if stride is None else conv_grid(grid, kernel, stride, padding)
            for stride in (stride_q, stride_kv)
        )
        lengths = table_lengths(table_grid or grid, stride_q, stride_kv)
        names = AXES[-len(grid) :]
        wanted = {"t": relative_time, "h": relative_space, "w": relative_space}
        self.axes = tuple(i for i, name in enumerate(names) if wanted[name])
        # The order of the names in released files: h, w, t.
        for name in sorted((names[i] for i in self.axes), key="hwt".index):
            axis = names.index(name)
            table = token_parameter(lengths[axis], self.head_width)
            if relative_zero_init:
                nn.init.zeros_(table)
            self.register_parameter(f"rel_pos_{name}", table)
        for axis in self.axes:
            index = relative_index(self.q_grid[axis], self.kv_grid[axis])
            self.register_buffer(f"_index_{names[axis]}", index, persistent=False)
        if self.axes:
            one_hots = key_one_hots(self.kv_grid, self.prefix, self.axes)
            self.register_buffer("_key_one_hots", one_hots, persistent=False)
        self._names = names
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        for which, stride in (("q", stride_q), ("k", stride_kv), ("v", stride_kv)):
            if stride is None or math.prod(kernel) == math.prod(stride) == 1:
                self.register_module(f"pool_{which}", None)
                self.register_module(f"norm_{which}", None)
                continue
            pool = POOL_CONV[len(grid)](self.head_width, kernel, stride, grid, self.prefix, impl)
            self.register_module(f"pool_{which}", pool)
            self.register_module(f"norm_{which}", layer_norm(self.head_width))
        self.dropout = nn.Dropout(dropout)

    def project(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Return queries, keys and values side by side, (B, N, 3 D), for x (B, N, D), normalised by `norm` first."""
        return self.qkv(x if norm is None else norm(x))

    def pooled(self, x: Tensor) -> list[Tensor]:
        """Pool queries, keys and values over the grid and normalise them over C.

        Args:
            x: (B, N, 3 D), as `project` returns it.

        Returns:
            queries, keys and values, each (B, N', G, C), of the dtype of `x`.
        """
        pooled = []
        layers = ((self.pool_q, self.norm_q), (self.pool_k, self.norm_k), (self.pool_v, self.norm_v))
        for share, (pool, norm) in zip(x.chunk(3, dim=-1), layers, strict=True):
            tokens = share if pool is None else pool(share)
            by_head = tokens.unflatten(-1, (self.num_heads, self.head_width))
            pooled.append(by_head if norm is None else norm(by_head).to(x.dtype))
        return pooled

    def tables(self) -> list[Tensor]:
        """Return, for each axis with relative positions, the row of every query and key: (queries, keys, C)."""
        tables = []
        for axis in self.axes:
            name, rows = self._names[axis], table_rows(self.q_grid[axis], self.kv_grid[axis])
            table = getattr(self, f"rel_pos_{name}")
            if len(table) != rows:
                table = F.interpolate(table.T[None], size=rows, mode="linear")[0].T
            tables.append(table[getattr(self, f"_index_{name}")])
        return tables

    def joined(self, out: Tensor, q: Tensor) -> Tensor:
        """Add the queries (residual pooling) and mix the heads: out, q (B, N', G, C or more) -> (B, N', D)."""
        channels = self.head_width
        out = _AddQueries.apply(out, q, self.prefix, channels) if self.residual_pooling else out[..., :channels]
        return self.dropout(self.proj(out.flatten(2)))

    def _reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention, residual pooling and projection in the reference form: (B, N', G, C) each -> (B, N', D)."""
        out = reference_attention(q, k, v, self.tables(), self.q_grid, self.kv_grid, self.axes)
        if self.residual_pooling:
            out[:, self.prefix :] += q[:, self.prefix :]
        return self.dropout(self.proj(out.flatten(2)))

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Attend from the pooled queries to the pooled keys.

        Args:
            x: (B, prefix + prod(grid), D).
            norm: applied to `x` first, if given.

        Returns:
            (B, prefix + prod(q_grid), D)
        """
        q, k, v = self.pooled(self.project(x, norm))
        if is_reference(self.impl):
            return self._reference(q, k, v)
        if self.axes:
            out, q = fast_attention(q, k, v, self.tables(), self._key_one_hots, self.q_grid, self.axes)
        else:
            out = _fused_attention(q, k, v)
        return self.joined(out, q)
