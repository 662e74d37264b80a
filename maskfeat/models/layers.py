"""Small layers that backbones share."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import timm.layers
import torch
from torch import Tensor, nn

from maskfeat.masking import resize_mask

# By number of axes: images have two, clips three.
CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}

layer_norm = partial(nn.LayerNorm, eps=1e-6)  # eps of the published models


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switches mixed precision off for work on `x`; on the meta device, where nothing is computed, there is none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Mlp(timm.layers.Mlp):
    """timm's, in two halves."""

    recomputable = ("first_half", "second_half")

    def first_half(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """x (B, N, D), to which `norm` is applied first -> (B, N, hidden)."""
        return self.fc1(x if norm is None else norm(x))

    def second_half(self, hidden: Tensor) -> Tensor:
        """Activation and second linear layer: (B, N, hidden) -> (B, N, D_out)."""
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(hidden)))))

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        return self.second_half(self.first_half(x, norm))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth (Huang et al., ECCV 2016): rates that grow linearly from 0 to `rate` over the blocks."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def hide_tokens(x: Tensor, hidden: Tensor, grid: Sequence[int], mask_token: Tensor | None) -> Tensor:
    """x (B, prod(grid), D) with the mask token (1, 1, D) wherever `hidden` (B, *mask_grid) bool is True."""
    assert mask_token is not None, "this backbone was built without a mask token"
    swap = resize_mask(hidden, grid).flatten(1).unsqueeze(-1)
    return torch.where(swap, mask_token.to(x.dtype), x)
