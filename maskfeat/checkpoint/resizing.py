"""Resizing weights: positions to another clip or image size, and convolutions between images and clips."""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def _resize_linear(value: Tensor, rows: int, dim: int) -> Tensor:
    """Resize dimension `dim` of a 2-D table to `rows` entries by linear interpolation."""
    table = value.float().movedim(dim, -1)
    return F.interpolate(table[None], size=rows, mode="linear")[0].movedim(-1, dim).to(value.dtype)


def _resize_bicubic(value: Tensor, length: int) -> Tensor | None:
    """Resize the square grid in (1, n^2, D) to (1, length, D); None if either grid is not a square."""
    have, want = math.isqrt(value.shape[1]), math.isqrt(length)
    if have * have != value.shape[1] or want * want != length:
        return None
    on_grid = value.float().reshape(1, have, have, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(on_grid, size=(want, want), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(value.dtype)


def _resize_positions(name: str, value: Tensor, shape: torch.Size, planar: bool) -> Tensor | None:
    """Resize position embeddings of another clip or image size; None if `name` is none or cannot be resized."""
    if value.dim() != len(shape):
        return None
    if re.search(r"rel_pos_[thw]$", name) and value.dim() == 2 and value.shape[1] == shape[1]:
        return _resize_linear(value, shape[0], 0)
    if value.dim() != 3 or value.shape[2] != shape[2]:
        return None
    if name == "pos_embed_temporal":
        return _resize_linear(value[0], shape[1], 0)[None]
    if name == "pos_embed_spatial":
        return _resize_bicubic(value, shape[1])
    if name == "pos_embed" and planar:
        for prefix in (1, 0):  # with a class token, whose position embedding is kept, or without
            body = _resize_bicubic(value[:, prefix:], shape[1] - prefix)
            if body is not None:
                return torch.cat([value[:, :prefix], body], dim=1)
    return None


def _change_axes(name: str, value: Tensor, shape: torch.Size, average: bool) -> Tensor | None:
    """Convert 2-D convolution weights for a 3-D model, or 3-D weights for a 2-D model.

    The patch kernel is placed at the centre frame or, with `average`, spread evenly over all frames: on a static clip
    the inflated model computes what the image model did. Pooling kernels are repeated over time (a LayerNorm after
    them removes the scale). 3-D weights are summed over time.
    """
    # Image models are also written as 3-D weights with one frame.
    if value.dim() == 4 and len(shape) == 5:
        value = value.unsqueeze(2)
    if value.dim() == 5 and len(shape) == 4:
        return value.sum(dim=2)
    if value.dim() != 5 or len(shape) != 5 or value.shape[:2] != shape[:2] or value.shape[3:] != shape[3:]:
        return None
    if value.shape[2] != 1:
        return None
    if ".pool_" in name:
        return value.expand(shape).clone()
    if average:
        return (value / shape[2]).expand(shape).clone()
    inflated = value.new_zeros(shape)
    inflated[:, :, shape[2] // 2] = value[:, :, 0]
    return inflated


def is_planar(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights are of images, whose joint positions are those of a square of patches.

    A clip's number of patches may be a square as well, and its positions would be taken for those of an image.
    """
    patch = state.get("patch_embed.proj.weight")
    return patch is None or patch.dim() == 4 or patch.shape[2] == 1  # images are also written as clips of one frame


def resize_weight(
    name: str, value: Tensor, shape: torch.Size, average: bool = False, planar: bool = True
) -> Tensor | None:
    """Return a value resized to the model's shape, or None if there is no rule for it.

    Tables of positions have rules by their names: `rel_pos_t`, `rel_pos_h` and `rel_pos_w` of blocks,
    `pos_embed_temporal`, `pos_embed_spatial` and, of images, `pos_embed`. Others, such as kernels of convolutions, have
    one between four and five axes, and from one frame to several.

    Args:
        name: of the parameter in released files.
        value: of any shape, float.
        shape: the model's.
        average: as in `fit_state`.
        planar: whether both the file and the model are of images, see `is_planar`.

    Returns:
        a tensor of `shape`, of the dtype of `value`.
    """
    for resized in (_resize_positions(name, value, shape, planar), _change_axes(name, value, shape, average)):
        if resized is not None and resized.shape == shape:
            return resized
    return None
