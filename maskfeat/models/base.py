"""The protocol between objectives and backbones.

Shape legend: B samples, C channels, D token width, N tokens (a class token, where there is one, stands first),
grid = ([T,] H, W) tokens along each axis.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

CLASSIFIER = "head.projection."
"""Where released transformers keep their linear classifier."""


class Tokens(NamedTuple):
    """What a backbone makes of a clip.

    Attributes:
        x: (B, N, D) tokens; N is the product of `grid`, plus one where a class token stands first.
        grid: tokens along ([T,] H, W).
    """

    x: Tensor
    grid: tuple[int, ...]

    @property
    def patches(self) -> Tensor:
        """(B, prod(grid), D): the tokens that stand for places in the clip."""
        return self.x[:, self.x.shape[1] - math.prod(self.grid) :]

    @property
    def has_class_token(self) -> bool:
        return self.x.shape[1] > math.prod(self.grid)


class Backbone(Protocol):
    """What an objective may ask of a backbone.

    Attributes:
        clip_size: ([T,] H, W) frames and pixels that go in.
        width: D of the tokens that come out.
        grid: the output grid for the clip size that the backbone was built for.
        token_pixels: pixels (H, W) that an output token stands for; frames are left out.
        frame_stride: frames that an output token stands for (1 for images).
        supports_hidden: whether `hidden` may be given.
        needs_norm: whether tokens come without the LayerNorm that whoever reads them has to apply.
        classifier: how released files of this architecture begin the names of the linear classifier.
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
        """Tokens of clip (B, C, [T,] H, W); `hidden` (B, *mask_grid) bool, True = replaced by the mask token."""
        ...

    def eval(self) -> object:
        """Evaluation mode, as of every `nn.Module`."""
        ...

    def no_weight_decay(self) -> set[str]:
        """Names of parameters (of this backbone) that published recipes exempt where ZERO_DECAY_POS_CLS is set."""
        ...

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks that are compiled, or whose activations are computed again, one by one."""
        ...

    def layer_id(self, name: str) -> int:
        """0 for embeddings, i + 1 for block i, `num_blocks` + 1 for the rest."""
        ...


def layer_id(name: str, num_blocks: int) -> int:
    """Layer of a released parameter name for layer-wise decay (BEiT, appendix; REFERENCE: embeddings are layer 0)."""
    embeddings = ("cls_token", "mask_token", "pos_embed", "patch_embed")
    if name.startswith(embeddings):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_blocks + 1


def init_weights(module: nn.Module) -> None:
    """The published initialisation: truncated normal (std 0.02) weights, biases 0.02, LayerNorm weight 1."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.constant_(module.bias, 0.02)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.constant_(module.bias, 0.02)


def token_parameter(*shape: int) -> nn.Parameter:
    """A learned token or position table, truncated normal with std 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))


def conv_grid(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Output size of a convolution or pooling along each axis."""
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True))


def check_clip_size(clip: Tensor, expected: Sequence[int]) -> None:
    """ValueError where a clip (B, C, [T,] H, W) has not the size ([T,] H, W) that a backbone was built for."""
    given = tuple(clip.shape[2:])
    if given != tuple(expected):
        raise ValueError(
            f"a clip of size {given} was given to a backbone built for {tuple(expected)}: "
            "DATA.TRAIN_CROP_SIZE, DATA.TEST_CROP_SIZE and DATA.NUM_FRAMES must agree with the data"
        )
