"""Heads that read tokens."""

import torch
from torch import Tensor, nn

from maskfeat.models.base import Tokens, init_weights
from maskfeat.models.layers import layer_norm


class ClassifierHead(nn.Module):
    """Dropout and one linear layer, under the released name `projection`."""

    def __init__(self, width: int, num_classes: int, dropout: float, init_scale: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(width, num_classes)
        init_weights(self.projection)
        with torch.no_grad():
            self.projection.weight.mul_(init_scale)
            self.projection.bias.mul_(init_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.dropout(x))


def pooled_norm(width: int) -> nn.LayerNorm:
    """The final LayerNorm of a classifier, initialised as published."""
    norm = layer_norm(width)
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
