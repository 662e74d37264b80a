"""Decomposed relative positions (MViTv2, Li et al., CVPR 2022, section 4.1): which row of which table is for whom.

Shape legend: L rows of a table along one axis.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_index(queries: int, keys: int) -> Tensor:
    """Return the row of the table of relative positions for each query and key along one axis.

    If the two lengths differ, positions on the coarser grid are scaled to the finer one (MViTv2's published code). It
    computes in float32, and what is nearly a whole number is cut off as there: a finer type gives other rows.

    Returns:
        (queries, keys) int64.
    """
    q_step, k_step = max(keys / queries, 1.0), max(queries / keys, 1.0)
    q_at = torch.arange(queries, dtype=torch.float32)[:, None] * q_step
    k_at = torch.arange(keys, dtype=torch.float32)[None, :] * k_step
    return (q_at - k_at + (keys - 1) * k_step).long()


def table_rows(queries: int, keys: int) -> int:
    """Return L, the number of rows of a table of relative positions along one axis."""
    return 2 * max(queries, keys) - 1


def divided(grid: Sequence[int], stride: Sequence[int] | None) -> tuple[int, ...]:
    """Return a grid divided by strides, rounded down; None = by none."""
    return tuple(size // by for size, by in zip(grid, stride or (1,) * len(grid), strict=True))


def table_lengths(
    grid: Sequence[int], stride_q: Sequence[int] | None, stride_kv: Sequence[int] | None
) -> tuple[int, ...]:
    """Return L along each axis of a grid ([T,] H, W), as PySlowFast sizes its tables.

    Grids are divided by strides there, where the convolutions round up, and time by none. Where another length is
    needed, tables are resized at every use.
    """
    pairs = zip(divided(grid, stride_q), divided(grid, stride_kv), strict=True)
    lengths = [max(table_rows(queries, keys), 1) for queries, keys in pairs]
    return (*(table_rows(size, size) for size in grid[:-2]), *lengths[-2:])
