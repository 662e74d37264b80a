"""MaskFeat: predict the HOG features of hidden patches (Wei et al., CVPR 2022).

Shape legend: B samples, T frames, H x W pixels; grid = output tokens ([T',] H', W'); n hidden tokens of the batch,
in the order of the flattened (B, *grid); F = 3 channels x bins x cells^2 numbers a token (108 as published).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maskfeat.batch import Batch, StepOutput
from maskfeat.masking import resize_mask
from maskfeat.models.base import Backbone
from maskfeat.models.layers import layer_norm
from maskfeat.objectives.base import Objective
from maskfeat.objectives.hog import hog, hog_tokens
from maskfeat.weights import LoadRules


class _SobelBuffers(nn.Module):
    """The constant kernels that released pre-training files carry as `hogs.0.weight_x` and `hogs.0.weight_y`."""

    def __init__(self) -> None:
        super().__init__()
        kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("weight_x", kernel.expand(3, 1, 3, 3).clone())
        self.register_buffer("weight_y", kernel.T.expand(3, 1, 3, 3).clone())


class _PredictionHead(nn.Module):
    """LayerNorm and one linear layer, under the released names `transforms.0.0` and `projections.0`."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.transforms = nn.ModuleList([nn.Sequential(layer_norm(width))])
        self.projections = nn.ModuleList([nn.Linear(width, features)])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.projections[0](self.transforms[0](x))


class MaskFeat(Objective):
    """Hides patches, predicts their HOG features, compares where hidden (mean squared error, section 3).

    Args:
        backbone: built with a mask token.
        bins, cell, window: of the HOG target, see `hog`.
    """

    def __init__(self, backbone: Backbone, bins: int = 9, cell: int = 8, window: int = 0) -> None:
        super().__init__()
        if not backbone.supports_hidden:
            raise ValueError(
                f"MaskFeat hides patches, and {type(backbone).__name__} has no mask token: it supports ViT and MViTv2 "
                "(MODEL.ARCH), built with one"
            )
        height, width = backbone.token_pixels
        if height != width or height % cell:
            raise ValueError(
                f"an output token stands for {height} x {width} pixels, which MASK.HOG_CELL = {cell} does not divide "
                "into whole cells of a square: change MASK.HOG_CELL or the crop and patch sizes"
            )
        self.backbone = backbone
        self.bins, self.cell, self.window = bins, cell, window
        self.cells = height // cell
        self.hogs = nn.ModuleList([_SobelBuffers()])
        self.pred_head = _PredictionHead(backbone.width, 3 * bins * self.cells**2)

    def hidden_tokens(self, batch: Batch) -> Tensor:
        """(B, prod(grid)) bool: the batch's mask on the output grid, flattened."""
        if batch.hidden is None:
            raise ValueError("MaskFeat got a batch without a mask: set AUG.GEN_MASK_LOADER True")
        return resize_mask(batch.hidden, self.backbone.grid).flatten(1)

    def target(self, clip: Tensor) -> Tensor:
        """HOG of every token: clip (B, 3, [T,] H, W), normalised and unmasked -> (B, prod(grid), F) float32."""
        with torch.autocast(clip.device.type, enabled=False):
            images = clip.float()
            if images.dim() == 5:
                # Every frame_stride-th frame, as many as the output grid has: (B T', 3, H, W).
                images = images[:, :, :: self.backbone.frame_stride].transpose(1, 2).flatten(0, 1)
            features = hog_tokens(hog(images, self.bins, self.cell, self.window), self.cells)
        return features.reshape(len(clip), math.prod(self.backbone.grid), -1)

    def weight(self, batch: Batch) -> Tensor:
        return self.hidden_tokens(batch).sum().float()

    def predict_hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(prediction, target), both (n, F): the prediction in the dtype of the head, the target float32."""
        hidden = self.hidden_tokens(batch)
        tokens = self.backbone.forward_tokens(batch.clip, batch.hidden)
        return self.pred_head(tokens.patches[hidden]), self.target(batch.clip)[hidden]

    def forward(self, batch: Batch) -> StepOutput:
        """Mean squared error over hidden tokens and features; metrics give what two constant predictors would cost.

        Every token is predicted and the visible ones get weight zero: shapes do not depend on the mask, so that
        nothing waits for the device to count it.
        """
        hidden = self.hidden_tokens(batch).unsqueeze(-1)
        tokens = self.backbone.forward_tokens(batch.clip, batch.hidden)
        prediction, target = self.pred_head(tokens.patches).float(), self.target(batch.clip)
        count = hidden.sum().clamp(min=1)
        terms = count * target.shape[-1]
        mean = (target * hidden).sum(dim=(0, 1)) / count
        loss = ((prediction - target).square() * hidden).sum() / terms
        metrics = {
            "zero_predictor": (target.square() * hidden).sum() / terms,
            "mean_hog_predictor": ((target - mean).square() * hidden).sum() / terms,
        }
        return StepOutput(loss, metrics)

    def load_rules(self, state: Mapping[str, Tensor]) -> LoadRules:
        return LoadRules(fresh=("hogs.*",))
