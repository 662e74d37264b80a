"""The interface between objectives and backbones.

Shape legend: B samples, C channels, D token width, N tokens (the class token, if there is one, comes first), grid =
([T,] H, W) tokens along each axis.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from maskfeat.errors import UserError

CLASSIFIER = "head.projection."
"""Prefix of the linear classifier's parameters in released transformers."""


class Tokens(NamedTuple):
    """The output of a backbone.

    Attributes:
        x: (B, N, D) tokens; N is the product of `grid`, plus one if there is a class token, which comes first.
        grid: number of tokens along ([T,] H, W).
    """

    x: Tensor
    grid: tuple[int, ...]

    @property
    def patches(self) -> Tensor:
        """Return the tokens on the grid, without the class token: (B, prod(grid), D)."""
        return self.x[:, self.x.shape[1] - math.prod(self.grid) :]

    @property
    def has_class_token(self) -> bool:
        """Return whether the first token is a class token."""
        return self.x.shape[1] > math.prod(self.grid)


class Backbone(Protocol):
    """The interface of every backbone.

    Attributes:
        clip_size: ([T,] H, W) of the input, in frames and pixels.
        width: D of the output tokens.
        grid: output grid for an input of `clip_size`.
        token_pixels: (H, W) of the image area of an output token, in pixels.
        frame_stride: number of frames per output token (1 for images).
        supports_hidden: whether `forward_tokens` takes `hidden`.
        needs_norm: whether the caller has to apply the final LayerNorm to the output tokens.
        classifier: prefix of the linear classifier's parameters in released files of this architecture.
        num_blocks: depth, for layer-wise learning rate decay.
    """

    clip_size: tuple[int, ...]
    width: int
    grid: tuple[int, ...]
    token_pixels: tuple[int, int]
    frame_stride: int
    supports_hidden: bool
    needs_norm: bool
    classifier: str
    num_blocks: int

    def forward_tokens(self, clip: Tensor, hidden: Tensor | None = None) -> Tokens:
        """Compute the tokens of a clip.

        Args:
            clip: (B, C, [T,] H, W) float.
            hidden: (B, *mask_grid) bool, True = replaced by the mask token; None = nothing is hidden.
        """
        ...

    def eval(self) -> object:
        """Switch to evaluation mode, as `nn.Module.eval` does."""
        ...

    def no_weight_decay(self) -> set[str]:
        """Return the names of this backbone's parameters that MVIT.ZERO_DECAY_POS_CLS exempts from weight decay."""
        ...

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the blocks to which compilation, activation checkpointing and sharding are applied one by one."""
        ...

    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter: 0 for embeddings, i + 1 for block i, `num_blocks` + 1 for the rest."""
        ...


def layer_id(name: str, num_blocks: int) -> int:
    """Return the layer of a released parameter name for layer-wise learning rate decay (BEiT, appendix).

    Embeddings are layer 0, block i is layer i + 1, everything else is layer `num_blocks` + 1.
    """
    embeddings = ("cls_token", "mask_token", "pos_embed", "patch_embed")
    if name.startswith(embeddings):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_blocks + 1


InitLayer = Callable[[nn.Module], None]
"""Initialises one layer, in place; does nothing to modules that are no layers."""


def init_weights(module: nn.Module) -> None:
    """Initialise a layer as PySlowFast: truncated normal weights of std 0.02, LayerNorm weights 1, biases 0.02; that of
    a convolution stays as PyTorch draws it.
    """
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
        nn.init.constant_(module.bias, 0.02)


def _init_cut(weight: Tensor) -> None:
    """Draw from a normal distribution of std 0.02, cut at one standard deviation: what is left has std 0.0108."""
    nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)


def init_layer_beit(module: nn.Module) -> None:
    """Initialise a layer as the code of BEiT and of MFM's paper: normal weights of std 0.02 cut at one standard
    deviation, LayerNorm weights 1, biases 0.
    """
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        _init_cut(module.weight)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | nn.LayerNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)


def init_layer_mae(module: nn.Module) -> None:
    """Initialise a layer as the code of MAE: Xavier uniform weights (Glorot and Bengio, 2010), also of the convolution
    that embeds patches, LayerNorm weights 1, biases 0. A depthwise convolution keeps PyTorch's weights.
    """
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d | nn.Conv3d) and module.groups == 1):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | nn.LayerNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)


INITS: dict[str, InitLayer] = {"pyslowfast": init_weights, "beit": init_layer_beit, "mae": init_layer_mae}
"""MVIT.INIT -> how a layer is initialised."""


def init_transformer(
    backbone: nn.Module, blocks: Sequence[nn.Module], init: str, grids: Mapping[str, Sequence[int]]
) -> InitLayer:
    """Initialise a transformer, in place.

    With "beit", tokens and positions are drawn like weights, and the last layers of both branches of block i, counted
    from 1, are divided by sqrt(2 i), so that the residual stream does not grow with depth. With "mae", positions start
    as sines and cosines; they are learned like any other.

    Args:
        backbone: with its tables of tokens and positions, see `token_parameter`, as parameters of its own.
        blocks: of the backbone, in order; each has `attn.proj` and `mlp.fc2`.
        init: a key of `INITS`.
        grids: name of a table of positions -> sizes of the axes that it is for; a class token may come before them.

    Returns:
        what initialises a layer on top of this backbone.
    """
    backbone.apply(INITS[init])
    if init == "beit":
        for table in backbone.parameters(recurse=False):
            _init_cut(table)
        for number, block in enumerate(blocks, start=1):
            for name in ("attn.proj.weight", "mlp.fc2.weight"):
                block.get_parameter(name).data.div_(math.sqrt(2 * number))
    if init == "mae":
        for name, table in backbone.named_parameters(recurse=False):
            if name in grids:
                positions = sine_cosine(grids[name], table.shape[-1])
                table.data[0, -len(positions) :] = positions
    return INITS[init]


def sine_cosine(grid: Sequence[int], width: int) -> Tensor:
    """Return sines and cosines of positions (Vaswani et al., 2017) along each axis of a grid, as MAE has them.

    Each axis has an equal share of the channels, and wavelengths from 2 pi to 2 pi 10000; channels left over are 0.

    Args:
        grid: sizes of the axes.

    Returns:
        (prod(grid), width) float32
    """
    share = width // (2 * len(grid))
    rate = 10000.0 ** -(torch.arange(share) / share)
    places = torch.stack(torch.meshgrid(*(torch.arange(float(size)) for size in grid), indexing="ij"), dim=-1)
    angles = places.reshape(-1, len(grid), 1) * rate
    table = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    return nn.functional.pad(table, (0, width - table.shape[1]))


def token_parameter(*shape: int) -> nn.Parameter:
    """Return a learned token or position table, drawn from a truncated normal distribution of std 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))


def conv_grid(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Return the output size of a convolution or pooling along each axis."""
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True))


def check_clip_size(clip: Tensor, expected: Sequence[int]) -> None:
    """Check the size of an input clip.

    Args:
        clip: (B, C, [T,] H, W).
        expected: ([T,] H, W) that the backbone was built for.

    Raises:
        UserError: if the sizes differ.
    """
    given = tuple(clip.shape[2:])
    if given != tuple(expected):
        raise UserError(
            f"a clip of size {given} was given to a backbone built for {tuple(expected)}: "
            "DATA.TRAIN_CROP_SIZE, DATA.TEST_CROP_SIZE and DATA.NUM_FRAMES must agree with the data"
        )
