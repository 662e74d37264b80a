"""MViTv2 (Li et al., CVPR 2022) for clips and images, with the parameter names of released files.

The size of the input decides between a video model, with ([T,] H, W) = (T, H, W), and an image model, with (H, W).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.layers import DropPath, make_divisible
from torch import Tensor, nn

from maskfeat.errors import UserError
from maskfeat.models.attention import PoolingAttention
from maskfeat.models.base import (
    CLASSIFIER,
    Tokens,
    check_clip_size,
    conv_grid,
    init_transformer,
    layer_id,
    token_parameter,
)
from maskfeat.models.layers import CONV, MAX_POOL, Mlp, drop_path_rates, hide_tokens, layer_norm
from maskfeat.models.relative_positions import divided


class PatchStem(nn.Module):
    """Patch embedding by a convolution whose patches may overlap."""

    def __init__(
        self, channels: int, width: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> None:
        super().__init__()
        self.proj = CONV[len(kernel)](channels, width, tuple(kernel), tuple(stride), tuple(padding))

    def forward(self, clip: Tensor) -> Tensor:
        """Embed the patches of a clip: (B, C, [T,] H, W) -> (B, N, D)."""
        return self.proj(clip).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class BlockPlan:
    """Width, heads and strides of one block; see `plan_blocks`.

    Attributes:
        width, width_out: D of the input and of the output.
        num_heads: heads of the attention.
        stride_q, stride_kv: pooling stride of the queries, and of the keys and values, along each axis; None = they
            are not pooled.
    """

    width: int
    width_out: int
    num_heads: int
    stride_q: tuple[int, ...] | None
    stride_kv: tuple[int, ...] | None


def adaptive_strides(start: Sequence[int], stride_q: Mapping[int, Sequence[int]], depth: int) -> list[tuple[int, ...]]:
    """Return the key/value strides of every block: `start`, divided by the query stride of every block on the way, so
    that the grid of keys and values stays the same.
    """
    strides, ones = [tuple(start)], (1,) * len(start)
    for i in range(depth):
        strides.append(tuple(max(kv // q, 1) for kv, q in zip(strides[-1], stride_q.get(i, ones), strict=True)))
    return strides[1:]


def plan_blocks(
    depth: int,
    width: int,
    num_heads: int,
    width_mul: Mapping[int, float],
    head_mul: Mapping[int, float],
    stride_q: Mapping[int, Sequence[int]],
    stride_kv: Mapping[int, Sequence[int]],
    stride_kv_adaptive: Sequence[int] | None,
) -> list[BlockPlan]:
    """Return the width, heads and strides of every block.

    Args:
        depth: number of blocks.
        width, num_heads: of block 0.
        width_mul, head_mul: factors by which width and heads grow, by block. The width grows in the MLP of the previous
            block.
        stride_q, stride_kv: query and key/value strides by block; blocks that are missing have no pooling layer.
        stride_kv_adaptive: where `adaptive_strides` start. Replaces `stride_kv` if given.
    """
    adaptive = adaptive_strides(stride_kv_adaptive, stride_q, depth) if stride_kv_adaptive else None
    plans = []
    for i in range(depth):
        num_heads = int(make_divisible(num_heads * head_mul.get(i, 1.0), 1))
        width = make_divisible(width * width_mul.get(i, 1.0), num_heads)
        heads_next = int(make_divisible(num_heads * head_mul.get(i + 1, 1.0), 1))
        width_out = make_divisible(width * width_mul.get(i + 1, 1.0), heads_next)
        q = tuple(stride_q[i]) if i in stride_q else None
        kv = adaptive[i] if adaptive else tuple(stride_kv[i]) if i in stride_kv else None
        plans.append(BlockPlan(width, width_out, num_heads, q, kv))
    return plans


class MultiScaleBlock(nn.Module):
    """One MViTv2 block, built for a fixed input grid.

    Args:
        plan: width, heads and strides.
        grid: ([T,] H, W) of the input tokens.
        table_grid: the same with sizes divided by strides, not pooled: see `PoolingAttention`.
        kernel: pooling kernel of the attention along each axis of `grid`.
        mlp_ratio: width of the hidden layer of the MLP over `plan.width`.
        drop_path, dropout: rates.

    The other arguments are those of `PoolingAttention`.
    """

    def __init__(
        self,
        plan: BlockPlan,
        *,
        grid: Sequence[int],
        table_grid: Sequence[int],
        kernel: Sequence[int],
        mlp_ratio: float,
        drop_path: float,
        dropout: float,
        class_token: bool,
        qkv_bias: bool,
        relative_space: bool,
        relative_time: bool,
        relative_zero_init: bool,
        residual_pooling: bool,
    ) -> None:
        super().__init__()
        self.grid, self.prefix = tuple(grid), int(class_token)
        self.norm1 = layer_norm(plan.width)
        self.attn = PoolingAttention(
            width=plan.width,
            num_heads=plan.num_heads,
            grid=grid,
            kernel=kernel,
            stride_q=plan.stride_q,
            stride_kv=plan.stride_kv,
            table_grid=table_grid,
            qkv_bias=qkv_bias,
            class_token=class_token,
            relative_space=relative_space,
            relative_time=relative_time,
            relative_zero_init=relative_zero_init,
            residual_pooling=residual_pooling,
            dropout=dropout,
        )
        self.grid_out = self.attn.q_grid
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = layer_norm(plan.width)
        self.mlp = Mlp(plan.width, int(plan.width * mlp_ratio), plan.width_out, drop=dropout)
        self.proj = nn.Linear(plan.width, plan.width_out) if plan.width != plan.width_out else None
        self.pool_skip: nn.Module | None = None
        if plan.stride_q and max(plan.stride_q) > 1:
            # Without a stride in time, frames are pooled as images: MaxPool2d is fast for channels-last input.
            stride = plan.stride_q[1:] if len(grid) == 3 and plan.stride_q[0] == 1 else plan.stride_q
            skip_kernel = tuple(s + 1 if s > 1 else s for s in stride)
            padding = tuple(k // 2 for k in skip_kernel)
            self.pool_skip = MAX_POOL[len(stride)](skip_kernel, stride, padding)
            pooled = conv_grid(grid[-len(stride) :], skip_kernel, stride, padding)
            if pooled != self.grid_out[-len(stride) :]:
                raise UserError(
                    f"a block whose queries have the stride {tuple(plan.stride_q)} and the pooling kernel "
                    f"{tuple(kernel)} has {self.grid_out} of {self.grid} tokens and pools its input to {pooled}: see "
                    "MVIT.POOL_Q_STRIDE and MVIT.POOL_KVQ_KERNEL (kernels of 3 and strides of 1 and 2 agree)"
                )

    def _skip(self, x: Tensor) -> Tensor:
        """Return the residual input, max-pooled over the grid if the queries are strided; not so the class token."""
        if self.pool_skip is None:
            return x
        on_grid = x[:, self.prefix :].unflatten(1, self.grid)
        if isinstance(self.pool_skip, nn.MaxPool2d):
            on_grid = on_grid.flatten(0, -4)
        pooled = self.pool_skip(on_grid.movedim(-1, 1)).movedim(1, -1).reshape(x.shape[0], -1, x.shape[-1])
        return torch.cat([x[:, : self.prefix], pooled], dim=1) if self.prefix else pooled

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (B, prefix + prod(grid), D) -> (B, prefix + prod(grid_out), D_out)."""
        x = self._skip(x) + self.drop_path(self.attn(x, self.norm1))
        skip = x if self.proj is None else self.proj(self.norm2(x))
        return skip + self.drop_path(self.mlp(x, self.norm2))


class MViT(nn.Module):
    """MViTv2 without the final norm, which the head applies.

    Args:
        clip_size: ([T,] H, W) of the input, in frames and pixels.
        kernel, stride, padding: of the patch convolution, along each axis of `clip_size`.
        in_channels: C of the input.
        width, depth, num_heads: width and heads are those of block 0.
        width_mul, head_mul, stride_q, stride_kv, stride_kv_adaptive: by block, see `plan_blocks`.
        pool_kernel: kernel of the pooling convolutions along each axis.
        mlp_ratio: width of the hidden layer of the MLP over the width of the block.
        drop_path: rate of the last block; it grows linearly from 0 over the blocks.
        dropout: rate on the tokens with their positions, and on the outputs of attention and MLP.
        position: absolute positions: "none", "joint" (one table) or "separate" (a table for space and one for time).
        maskable: whether to have a mask token, so that `forward_tokens` takes `hidden`.
        init: of the weights, see `init_transformer`.

    The other arguments are those of `PoolingAttention`.
    """

    needs_norm = True
    classifier = CLASSIFIER

    def __init__(
        self,
        *,
        clip_size: Sequence[int] = (16, 224, 224),
        kernel: Sequence[int] = (3, 7, 7),
        stride: Sequence[int] = (2, 4, 4),
        padding: Sequence[int] = (1, 3, 3),
        in_channels: int = 3,
        width: int = 96,
        depth: int = 16,
        num_heads: int = 1,
        width_mul: Mapping[int, float] | None = None,
        head_mul: Mapping[int, float] | None = None,
        stride_q: Mapping[int, Sequence[int]] | None = None,
        stride_kv: Mapping[int, Sequence[int]] | None = None,
        stride_kv_adaptive: Sequence[int] | None = None,
        pool_kernel: Sequence[int] = (3, 3, 3),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        class_token: bool = True,
        position: str = "none",
        relative_space: bool = True,
        relative_time: bool = True,
        relative_zero_init: bool = False,
        residual_pooling: bool = True,
        maskable: bool = False,
        init: str = "pyslowfast",
    ) -> None:
        super().__init__()
        self.clip_size, self.num_blocks = tuple(clip_size), depth
        self.stem_grid = conv_grid(clip_size, kernel, stride, padding)
        self.supports_hidden = maskable
        self.cls_token = token_parameter(1, 1, width) if class_token else None
        self._add_positions(position, width, class_token)
        # After the positions, as in published files: states of optimizers know parameters by their order alone.
        self.mask_token = token_parameter(1, 1, width) if maskable else None
        self.dropout = nn.Dropout(dropout)
        self.patch_embed = PatchStem(in_channels, width, kernel, stride, padding)
        strides = stride_q or {}, stride_kv or {}, stride_kv_adaptive
        plans = plan_blocks(depth, width, num_heads, width_mul or {}, head_mul or {}, *strides)
        blocks: list[MultiScaleBlock] = []
        grid, table_grid = self.stem_grid, divided(clip_size, stride)
        for plan, rate in zip(plans, drop_path_rates(drop_path, depth), strict=True):
            block = MultiScaleBlock(
                plan,
                grid=grid,
                table_grid=table_grid,
                kernel=pool_kernel,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                dropout=dropout,
                class_token=class_token,
                qkv_bias=qkv_bias,
                relative_space=relative_space,
                relative_time=relative_time,
                relative_zero_init=relative_zero_init,
                residual_pooling=residual_pooling,
            )
            blocks.append(block)
            grid, table_grid = block.grid_out, divided(table_grid, plan.stride_q)
        self.blocks = nn.ModuleList(blocks)
        self.grid, self.width = grid, plans[-1].width_out
        self.token_pixels = (clip_size[-2] // grid[-2], clip_size[-1] // grid[-1])
        self.frame_stride = clip_size[0] // grid[0] if len(grid) == 3 else 1
        self.init_layer = init_transformer(self, blocks, init, self._position_grids())

    def _add_positions(self, position: str, width: int, class_token: bool) -> None:
        if position not in ("none", "joint", "separate"):
            raise ValueError(f"position is {position!r}, expected 'none', 'joint' or 'separate'")
        if position == "joint":
            num = int(class_token) + math.prod(self.stem_grid)
            self.pos_embed = token_parameter(1, num, width)
        elif position == "separate":
            frames, height, columns = self.stem_grid
            self.pos_embed_spatial = token_parameter(1, height * columns, width)
            self.pos_embed_temporal = token_parameter(1, frames, width)
            if class_token:
                self.pos_embed_class = token_parameter(1, 1, width)
        self.position = position

    def _position_grids(self) -> dict[str, Sequence[int]]:
        time, space = self.stem_grid[:-2], self.stem_grid[-2:]
        return {"pos_embed": self.stem_grid, "pos_embed_spatial": space, "pos_embed_temporal": time}

    def _positions(self) -> Tensor:
        if self.position == "joint":
            return self.pos_embed
        # (1, T, 1, D) + (1, 1, H W, D)
        table = (self.pos_embed_temporal[:, :, None] + self.pos_embed_spatial[:, None]).flatten(1, 2)
        return torch.cat([self.pos_embed_class, table], dim=1) if self.cls_token is not None else table

    def forward(self, clip: Tensor, hidden: Tensor | None = None) -> Tokens:
        """Return `forward_tokens(clip, hidden)`."""
        return self.forward_tokens(clip, hidden)

    def forward_tokens(self, clip: Tensor, hidden: Tensor | None = None) -> Tokens:
        """Compute the tokens of a clip.

        Args:
            clip: (B, C, [T,] H, W) float, of the size that the model was built for.
            hidden: (B, *mask_grid) bool, True = replaced by the mask token after the patch embedding; None = nothing.

        Returns:
            tokens (B, [1 +] prod(grid), D) on the output grid.
        """
        check_clip_size(clip, self.clip_size)
        x = self.patch_embed(clip)
        if hidden is not None:
            x = hide_tokens(x, hidden, self.stem_grid, self.mask_token)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        if self.position != "none":
            x = x + self._positions()
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return Tokens(x, self.grid)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the class token, the positions and the tables of relative positions."""
        positions = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class")
        names = {name for name in positions if hasattr(self, name)}
        if self.cls_token is not None:
            names.add("cls_token")
        for name, _ in self.named_parameters():
            if ".rel_pos_" in name:
                names.add(name)
        return names

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the transformer blocks."""
        return list(self.blocks)

    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter for layer-wise learning rate decay."""
        return layer_id(name, self.num_blocks)
