"""Heads on top of the output tokens of a backbone."""

import torch
from torch import Tensor, nn

from maskfeat.models.base import Backbone, InitLayer, Tokens, init_weights
from maskfeat.models.layers import layer_norm


def init_on(backbone: Backbone) -> InitLayer:
    """Return what initialises a layer on top of a backbone: its `init_layer`, where it has one."""
    init: InitLayer = getattr(backbone, "init_layer", init_weights)
    return init


class ClassifierHead(nn.Module):
    """Dropout and a linear layer.

    Args:
        width: D of the input.
        num_classes: K.
        dropout: rate before the linear layer.
        init_scale: factor on the weights and biases of the published initialisation of transformers; None = PyTorch's
            default initialisation, which torchvision's ResNets use.
        init: that initialisation.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        dropout: float,
        init_scale: float | None,
        init: InitLayer = init_weights,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(width, num_classes)
        if init_scale is None:
            return
        init(self.projection)
        with torch.no_grad():
            self.projection.weight.mul_(init_scale)
            self.projection.bias.mul_(init_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits: (B, D) -> (B, K)."""
        return self.projection(self.dropout(x))


def token_norm(backbone: Backbone) -> nn.Module:
    """Return the final LayerNorm for a backbone's tokens, initialised like its layers; identity if it needs none."""
    if not backbone.needs_norm:
        return nn.Identity()
    norm = layer_norm(backbone.width)
    init_on(backbone)(norm)
    return norm


def pool_tokens(tokens: Tokens, norm: nn.Module, mean: bool) -> Tensor:
    """Reduce the tokens of a sample to one vector for the head.

    Args:
        tokens: output of a backbone.
        norm: the final LayerNorm, see `token_norm`.
        mean: average the tokens without the class token, then apply `norm`. Otherwise apply `norm`, then take the class
            token, or the average if there is none.

    Returns:
        (B, D)
    """
    if mean:
        return norm(tokens.patches.mean(dim=1))
    x = norm(tokens.x)
    return x[:, 0] if tokens.has_class_token else x.mean(dim=1)
