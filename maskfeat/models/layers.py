"""Small layers that backbones share."""

from functools import partial

from torch import nn

layer_norm = partial(nn.LayerNorm, eps=1e-6)  # eps of the published models


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth (Huang et al., ECCV 2016): rates that grow linearly from 0 to `rate` over the blocks."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
