"""Small layers that backbones share, and the choice between fast and reference forms.

Attention, pooling and HOG have two forms that compute the same function: the fast one, which is the default, and a
short reference one that follows the paper. Tests and benchmarks compare the two. To change the method itself, start
from the reference form.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import timm.layers
import torch
from torch import Tensor, nn

from maskfeat.masking import resize_mask

IMPLS = ("fast", "reference")

# By the number of axes: two for images, three for clips.
CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}

layer_norm = partial(nn.LayerNorm, eps=1e-6)  # eps of the published models


def is_reference(impl: str) -> bool:
    """Return whether `impl` selects the reference form.

    Raises:
        ValueError: if `impl` is neither "fast" nor "reference".
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, expected one of {IMPLS}")
    return impl == "reference"


def set_impl(model: nn.Module, impl: str) -> None:
    """Select the fast or the reference form in every layer of a model or an objective, in place.

    The weights stay as they are. For the attention of a plain ViT, which is timm's, the reference form is
    softmax(q k^T) v without a fused kernel.

    Args:
        impl: "fast" or "reference".
    """
    reference = is_reference(impl)
    for module in model.modules():
        if isinstance(module, timm.layers.Attention):
            module.fused_attn = not reference and bool(timm.layers.use_fused_attn())  # type: ignore[misc]
        elif getattr(module, "impl", None) in IMPLS:
            module.impl = impl  # type: ignore[assignment]


def unfuse_attention(model: nn.Module) -> None:
    """Have the attention of a plain ViT, which is timm's, multiply matrices without a fused kernel, in place.

    In bfloat16 on a CPU that is up to four times as fast: the backward pass of the fused kernel multiplies in float32.
    """
    for module in model.modules():
        if isinstance(module, timm.layers.Attention):
            module.fused_attn = False  # type: ignore[misc]


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without mixed precision on the device of `x`.

    On the meta device, which has no autocast, it does nothing.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Mlp(timm.layers.Mlp):
    """timm's MLP in two halves, of which activation checkpointing can recompute each on its own."""

    recomputable = ("first_half", "second_half")

    def first_half(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Apply `norm`, if there is one, and the first linear layer: (B, N, D) -> (B, N, hidden)."""
        return self.fc1(x if norm is None else norm(x))

    def second_half(self, hidden: Tensor) -> Tensor:
        """Apply the activation and the second linear layer: (B, N, hidden) -> (B, N, D_out)."""
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(hidden)))))

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Map (B, N, D) to (B, N, D_out), normalising the input by `norm` first, if there is one."""
        return self.second_half(self.first_half(x, norm))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the drop path rate of every block, growing linearly from 0 to `rate` (Huang et al., ECCV 2016)."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def hide_tokens(x: Tensor, hidden: Tensor, grid: Sequence[int], mask_token: Tensor | None) -> Tensor:
    """Replace hidden tokens by the mask token.

    Args:
        x: (B, prod(grid), D).
        hidden: (B, *mask_grid) bool, True = hidden; resized to `grid`.
        mask_token: (1, 1, D).
    """
    assert mask_token is not None, "this backbone was built without a mask token"
    swap = resize_mask(hidden, grid).flatten(1).unsqueeze(-1)
    return torch.where(swap, mask_token.to(x.dtype), x)
