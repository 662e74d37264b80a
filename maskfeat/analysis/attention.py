"""Where a transformer looks: the weights of its attention, from the queries and keys that its blocks compute.

Shape legend: B samples, N queries, Nk keys (the first `prefix` of each, the class token, are not on a grid), G heads,
grid = ([T,] H, W) tokens along each axis.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskfeat.analysis.hooks import captured
from maskfeat.analysis.model import Model
from maskfeat.errors import UserError
from maskfeat.models.attention import PoolingAttention, reference_weights


class Attention(NamedTuple):
    """The attention of one block.

    Attributes:
        weights: (B, G, N, Nk) float32; each row sums to 1.
        key_grid: ([T,] H, W) of the keys.
        prefix: number of leading tokens that are not on the grid, such as a class token.
    """

    weights: Tensor
    key_grid: tuple[int, ...]
    prefix: int


def _weights(layer: nn.Module, given: Sequence[Any], grid: tuple[int, ...]) -> Attention:
    """Return the weights of an attention layer for the arguments that its block gave it."""
    if isinstance(layer, PoolingAttention):
        q, k, _ = layer.pooled(layer.project(*given))
        found = reference_weights(q, k, layer.tables(), layer.q_grid, layer.kv_grid, layer.axes)
        return Attention(found.float(), layer.kv_grid, layer.prefix)
    if not isinstance(layer, timm.layers.Attention):
        raise UserError(f"the attention of {type(layer).__name__} is not known here: only that of ViT and MViTv2")
    prefix = given[0].shape[1] - math.prod(grid)  # a plugin may leave out the leading tokens of its last block
    if prefix < 0:
        raise UserError(f"attention of {given[0].shape[1]} tokens, fewer than the {math.prod(grid)} of the grid {grid}")
    mixed: Any = layer.qkv(given[0])
    q, k, _ = mixed.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, G, N, C) each
    scores = (layer.q_norm(q) * layer.scale) @ layer.k_norm(k).transpose(-2, -1)
    return Attention(scores.softmax(dim=-1).float(), grid, prefix)


@torch.no_grad()
def attentions(model: Model, x: Tensor, numbers: Sequence[int]) -> list[Attention]:
    """Return the attention of blocks.

    Args:
        model: with a ViT or an MViTv2.
        x: (B, 3, [T,] H, W) float32.
        numbers: of the blocks, from 0; negative ones count from the end.

    Raises:
        UserError: the network has no attention, or no such block.
    """
    blocks: Any = model.backbone.repeated_blocks()
    if not all(hasattr(block, "attn") for block in blocks):
        raise UserError(f"{model.source} is a {type(model.backbone).__name__}, which has no attention: --what pca")
    wrong = [number for number in numbers if not -len(blocks) <= number < len(blocks)]
    if wrong:
        raise UserError(f"--block must be from {-len(blocks)} to {len(blocks) - 1}; given {wrong[0]}")
    layers = {number: blocks[number].attn for number in numbers}
    with captured(layers, inputs=True) as given:
        grid = model.tokens(x).grid
    return [_weights(layers[number], given[number], grid) for number in numbers]


def attention_map(attention: Attention) -> Tensor:
    """Return how much each place is looked at, by the class token or, without one, by all tokens on average.

    Returns:
        (B, *key_grid) float32: mean over heads; sums to 1 for each sample.
    """
    heads = attention.weights.mean(dim=1)
    return _on_grid(heads[:, 0] if attention.prefix else heads.mean(dim=1), attention)


def rollout(layers: Sequence[Attention]) -> Tensor:
    """Return attention rollout (Abnar and Zuidema, ACL 2020, section 4): how much of each input token reaches the class
    token, or the tokens on average, if every block passes on half of what it attends to and half of its input.

    Args:
        layers: the attention of every block, the first one first.

    Returns:
        (B, *grid) float32; sums to 1 for each sample.

    Raises:
        UserError: blocks pool their keys.
    """
    joined: Tensor | None = None
    for layer in layers:
        heads = layer.weights.mean(dim=1)
        queries, keys = heads.shape[1:]
        if queries != keys or (joined is not None and joined.shape != heads.shape):
            raise UserError("rollout needs as many keys as queries in every block, and MViTv2 pools: --what attention")
        mixed = (heads + torch.eye(heads.shape[1], device=heads.device)) / 2  # rows sum to 1 as before
        joined = mixed if joined is None else mixed @ joined
    assert joined is not None, "a network has blocks"
    return _on_grid(joined[:, 0] if layers[0].prefix else joined.mean(dim=1), layers[0])


def _on_grid(row: Tensor, attention: Attention) -> Tensor:
    patches = row[:, attention.prefix :]
    return (patches / patches.sum(dim=1, keepdim=True)).unflatten(1, attention.key_grid)


def components(tokens: Tensor, number: int = 3) -> Tensor:
    """Return the first principal components of the tokens of each sample, from 0 to 1.

    Args:
        tokens: (B, N, D) float, on the grid.
        number: of components.

    Returns:
        (B, N, number) float32: 0 and 1 are the 2nd and 98th percentile of each; the sign of each is such that its
        largest weight is positive.
    """
    centred = tokens.float() - tokens.float().mean(dim=1, keepdim=True)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)  # (B, min(N, D), D)
    directions = directions[:, :number]
    largest = directions.gather(2, directions.abs().argmax(dim=2, keepdim=True))
    scores = centred @ (directions * largest.sign()).transpose(1, 2)
    low, high = (scores.quantile(share, dim=1, keepdim=True) for share in (0.02, 0.98))
    return ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def spread(values: Tensor, size: Sequence[int]) -> Tensor:
    """Give each frame and pixel the value of its token or pooled key: (B, C, *grid) -> (B, C, [T,] H, W)."""
    return F.interpolate(values, size=tuple(size), mode="nearest")
