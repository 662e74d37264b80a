"""Pooling attention as its paper writes it down (MViTv2, Li et al., CVPR 2022, section 4.1), and a ViT's as usual.

Every score is stored; the relative positions are added to them, those along h and w first and those along t then.
The functions take the weights of a built model, so that losses and gradients compare parameter by parameter.

Shape legend: B samples, G heads, N tokens (class token first where there is one), C channels of a head,
(T, H, W) the grid of queries, (t, h, w) that of keys; T = t = 1 for images.
"""

import math
import types

import torch
from timm.layers import Attention
from torch import Tensor, nn

from maskfeat.models.attention import PoolingAttention


def relative_table(table: Tensor, queries: int, keys: int) -> Tensor:
    """Rows of `table` (L, C) for each pair along one axis: (queries, keys, C)."""
    q_ratio, k_ratio = max(keys / queries, 1.0), max(queries / keys, 1.0)
    q_at = torch.arange(queries, device=table.device)[:, None] * q_ratio
    k_at = torch.arange(keys, device=table.device)[None, :] * k_ratio
    return table[(q_at - k_at + (keys - 1) * k_ratio).long()]


def pool(
    x: Tensor, convolution: nn.Module | None, norm: nn.Module | None, grid: tuple[int, ...], prefix: int
) -> Tensor:
    """x (B, G, N, C) -> (B, G, N', C): the class token aside, a convolution over the grid, then LayerNorm."""
    if convolution is None or norm is None:
        return x
    batch, heads, _, channels = x.shape
    cls, patches = x[:, :, :prefix], x[:, :, prefix:]
    patches = patches.reshape(batch * heads, *grid, channels).movedim(-1, 1).contiguous()
    patches = convolution(patches).reshape(batch, heads, channels, -1).transpose(2, 3)
    return norm(torch.cat([cls, patches], dim=2))


def add_relative_positions(attention: PoolingAttention, scores: Tensor, q: Tensor) -> Tensor:
    """scores (B, G, N, Nk), changed in place, plus q (B, G, N, C) times the relative positions."""
    prefix = attention.prefix
    size_q = (1,) * (3 - len(attention.q_grid)) + attention.q_grid
    size_k = (1,) * (3 - len(attention.kv_grid)) + attention.kv_grid
    batch, heads, _, channels = q.shape
    on_grid = q[:, :, prefix:].reshape(batch, heads, *size_q, channels)
    pairs = (batch, heads, math.prod(size_q), math.prod(size_k))
    if hasattr(attention, "rel_pos_h"):
        table_h = relative_table(attention.get_parameter("rel_pos_h"), size_q[1], size_k[1])
        table_w = relative_table(attention.get_parameter("rel_pos_w"), size_q[2], size_k[2])
        along_h = torch.einsum("bgthwc,hkc->bgthwk", on_grid, table_h)
        along_w = torch.einsum("bgthwc,wkc->bgthwk", on_grid, table_w)
        split = scores[:, :, prefix:, prefix:].view(batch, heads, *size_q, *size_k)
        added = split + along_h[..., None, :, None] + along_w[..., None, None, :]
        scores[:, :, prefix:, prefix:] = added.reshape(pairs)
    if hasattr(attention, "rel_pos_t"):
        table_t = relative_table(attention.get_parameter("rel_pos_t"), size_q[0], size_k[0])
        along_t = torch.einsum("bgthwc,tkc->bgthwk", on_grid, table_t)
        split = scores[:, :, prefix:, prefix:].view(batch, heads, *size_q, *size_k)
        scores[:, :, prefix:, prefix:] = (split + along_t[..., :, None, None]).reshape(pairs)
    return scores


def reference_forward(attention: PoolingAttention, x: Tensor, norm: nn.Module | None = None) -> Tensor:
    """What `attention(x, norm)` computes: x (B, N, D) -> (B, N', D)."""
    x = x if norm is None else norm(x)
    batch, num, _ = x.shape
    prefix, grid = attention.prefix, attention.grid
    q, k, v = attention.qkv(x).reshape(batch, num, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q = pool(q, attention.pool_q, attention.norm_q, grid, prefix)
    k = pool(k, attention.pool_k, attention.norm_k, grid, prefix)
    v = pool(v, attention.pool_v, attention.norm_v, grid, prefix)
    scores = (q * attention.head_width**-0.5) @ k.transpose(-2, -1)
    scores = add_relative_positions(attention, scores, q)
    out = scores.softmax(dim=-1) @ v
    if attention.residual_pooling:
        out[:, :, prefix:] += q[:, :, prefix:]
    out = out.transpose(1, 2).reshape(batch, -1, attention.num_heads * attention.head_width)
    return attention.dropout(attention.proj(out))


def use_reference_attention(model: nn.Module) -> nn.Module:
    """Every attention of a built ViT or MViTv2 computes as written here from now on; the weights stay its own."""
    for module in model.modules():
        if isinstance(module, PoolingAttention):
            module.forward = types.MethodType(reference_forward, module)  # type: ignore[method-assign]
        elif isinstance(module, Attention):
            module.fused_attn = False  # type: ignore[misc]  # timm's own softmax(q k^T) v
    return model
