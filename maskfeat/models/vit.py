"""Vision Transformer (Dosovitskiy et al., ICLR 2021) of timm's layers, with the parameter names of released files."""

from collections.abc import Sequence

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maskfeat.models.base import CLASSIFIER, Tokens, check_clip_size, init_transformer, layer_id, token_parameter
from maskfeat.models.layers import Mlp, drop_path_rates, hide_tokens, layer_norm


class ViT(nn.Module):
    """A plain ViT without the final norm, which the head applies.

    Args:
        image_size: (H, W) of the input in pixels.
        patch: (h, w) of a patch in pixels.
        in_channels: C of the input.
        width, depth, num_heads, mlp_ratio, qkv_bias: of the blocks, as in timm.
        drop_path: rate of the last block; it grows linearly from 0 over the blocks.
        dropout: rate on the tokens with their positions, and on the outputs of attention and MLP.
        class_token: whether to prepend a class token.
        position: whether to add learned absolute positions.
        maskable: whether to have a mask token, so that `forward_tokens` takes `hidden`.
        init: of the weights, see `init_transformer`.
    """

    needs_norm = True
    classifier = CLASSIFIER

    def __init__(
        self,
        *,
        image_size: Sequence[int] = (224, 224),
        patch: Sequence[int] = (16, 16),
        in_channels: int = 3,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        class_token: bool = True,
        position: bool = True,
        maskable: bool = False,
        init: str = "pyslowfast",
    ) -> None:
        super().__init__()
        size, patch_size = (image_size[0], image_size[1]), (patch[0], patch[1])
        self.clip_size: tuple[int, ...] = size
        self.width, self.num_blocks = width, depth
        self.grid: tuple[int, ...] = (size[0] // patch_size[0], size[1] // patch_size[1])
        self.token_pixels, self.frame_stride = patch_size, 1
        self.supports_hidden = maskable
        prefix = int(class_token)
        num_tokens = self.grid[0] * self.grid[1]
        self.cls_token = token_parameter(1, 1, width) if class_token else None
        self.pos_embed = token_parameter(1, num_tokens + prefix, width) if position else None
        self.mask_token = token_parameter(1, 1, width) if maskable else None
        self.dropout = nn.Dropout(dropout)
        self.patch_embed = PatchEmbed(size, patch_size, in_channels, width)  # type: ignore[arg-type]  # takes a pair
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=dropout,
                drop_path=rate,
                norm_layer=layer_norm,  # type: ignore[arg-type]  # any callable will do
                mlp_layer=Mlp,
            )
            for rate in drop_path_rates(drop_path, depth)
        )
        self.init_layer = init_transformer(self, list(self.blocks), init, {"pos_embed": self.grid})

    def forward(self, clip: Tensor, hidden: Tensor | None = None) -> Tokens:
        """Return `forward_tokens(clip, hidden)`."""
        return self.forward_tokens(clip, hidden)

    def forward_tokens(self, clip: Tensor, hidden: Tensor | None = None) -> Tokens:
        """Compute the tokens of an image.

        Args:
            clip: (B, C, H, W) float, of the size that the model was built for.
            hidden: (B, *mask_grid) bool, True = replaced by the mask token after the patch embedding; None = nothing.

        Returns:
            tokens (B, [1 +] prod(grid), D) on the grid of patches.
        """
        check_clip_size(clip, self.clip_size)
        x = self.patch_embed(clip)
        if hidden is not None:
            x = hide_tokens(x, hidden, self.grid, self.mask_token)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return Tokens(x, self.grid)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the class token and the positions."""
        names = {"cls_token": self.cls_token, "pos_embed": self.pos_embed}
        return {name for name, parameter in names.items() if parameter is not None}

    def repeated_blocks(self) -> list[nn.Module]:
        """Return the transformer blocks."""
        return list(self.blocks)

    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter for layer-wise learning rate decay."""
        return layer_id(name, self.num_blocks)
