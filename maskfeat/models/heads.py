"""Heads that read tokens."""

import torch
from torch import Tensor, nn

from maskfeat.models.base import Backbone, Tokens, init_weights
from maskfeat.models.layers import layer_norm


class ClassifierHead(nn.Module):
    """Dropout and one linear layer, `projection`.

    Args:
        init_scale: factor on the initial weights of the published transformers; None = PyTorch's own initial weights,
            as torchvision's ResNets start with.
    """

    def __init__(self, width: int, num_classes: int, dropout: float, init_scale: float | None) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(width, num_classes)
        if init_scale is None:
            return
        init_weights(self.projection)
        with torch.no_grad():
            self.projection.weight.mul_(init_scale)
            self.projection.bias.mul_(init_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.dropout(x))


def token_norm(backbone: Backbone) -> nn.Module:
    """The final LayerNorm that a backbone's tokens need, initialised as published, or nothing."""
    if not backbone.needs_norm:
        return nn.Identity()
    norm = layer_norm(backbone.width)
    init_weights(norm)
    return norm


def pool_tokens(tokens: Tokens, norm: nn.Module, mean: bool) -> Tensor:
    """(B, D) for the head.

    `mean`: average over patches (the class token left out), then norm. Otherwise: norm, then the class token, or the
    average where there is none.
    """
    if mean:
        return norm(tokens.patches.mean(dim=1))
    x = norm(tokens.x)
    return x[:, 0] if tokens.has_class_token else x.mean(dim=1)
