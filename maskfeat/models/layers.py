"""Small layers that backbones share."""

from collections.abc import Callable
from functools import partial

from torch import nn

# By number of axes: images have two, clips three.
CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}

layer_norm = partial(nn.LayerNorm, eps=1e-6)  # eps of the published models


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth (Huang et al., ECCV 2016): rates that grow linearly from 0 to `rate` over the blocks."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
