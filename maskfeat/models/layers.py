"""Small layers that backbones share."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from maskfeat.masking import resize_mask

# By number of axes: images have two, clips three.
CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}

layer_norm = partial(nn.LayerNorm, eps=1e-6)  # eps of the published models


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth (Huang et al., ECCV 2016): rates that grow linearly from 0 to `rate` over the blocks."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def hide_tokens(x: Tensor, hidden: Tensor, grid: Sequence[int], mask_token: Tensor | None) -> Tensor:
    """x (B, prod(grid), D) with the mask token (1, 1, D) wherever `hidden` (B, *mask_grid) bool is True."""
    assert mask_token is not None, "this backbone was built without a mask token"
    swap = resize_mask(hidden, grid).flatten(1).unsqueeze(-1)
    return torch.where(swap, mask_token.to(x.dtype), x)
