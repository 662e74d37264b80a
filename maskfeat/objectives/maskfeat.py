"""MaskFeat: predict the HOG features of hidden patches (Wei et al., CVPR 2022).

Shape legend: B samples, T frames, H x W pixels; grid = output tokens ([T',] H', W'); n hidden tokens of the batch,
in the order of the flattened (B, *grid); F = 3 channels x bins x cells^2 numbers a token (108 as published).
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from maskfeat.batch import Batch, StepOutput
from maskfeat.checkpoint.weights import LoadRules
from maskfeat.errors import UserError
from maskfeat.masking import resize_mask
from maskfeat.models.base import Backbone, conv_grid
from maskfeat.models.layers import full_precision, is_reference, layer_norm
from maskfeat.models.mvit_config import TRANSFORMER
from maskfeat.models.relative_positions import divided
from maskfeat.objectives.base import Objective, can_be_read, check_patch_masks, sample_patches
from maskfeat.objectives.hog import cut_patches, hog, hog_tokens, pad_border, patch_features, pixel_weights
from maskfeat.objectives.predictions import hog_rows
from maskfeat.pictures import HogRow
from maskfeat.registry import ObjectiveSpec, Range, backbone_spec, register


class _SobelBuffers(nn.Module):
    """The constant kernels that released pre-training files carry as `hogs.0.weight_x` and `hogs.0.weight_y`."""

    def __init__(self) -> None:
        super().__init__()
        kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("weight_x", kernel.expand(3, 1, 3, 3).contiguous())
        self.register_buffer("weight_y", kernel.T.expand(3, 1, 3, 3).contiguous())


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


def most_hidden_tokens(max_hidden: int, cells: Sequence[int], tokens: Sequence[int]) -> int:
    """Return how many tokens a mask can hide at most, rounded up to a multiple of 16: one shape for nearly all batches.

    Args:
        max_hidden: hidden cells of the mask.
        cells: grid of the mask.
        tokens: grid of the tokens.
    """
    per_cell = math.prod(math.ceil(size / cell) for size, cell in zip(tokens, cells, strict=True))
    return min(math.ceil(max_hidden * per_cell / 16) * 16, math.prod(tokens))


class MaskFeat(Objective):
    """Predict the HOG features of hidden patches; the loss is the mean squared error on them (section 3).

    Args:
        backbone: built with a mask token.
        bins, cell, window: of the HOG target, see `hog`.
        shuffle: in training, let each image predict the targets of another image of its batch. A control experiment,
            which can learn nothing but the distribution of the targets.
        impl: "fast" or "reference": the form in which HOG targets are computed. `set_impl` selects the form of the
            backbone as well.
    """

    compilable = ("features",)

    def __init__(
        self,
        backbone: Backbone,
        bins: int = 9,
        cell: int = 8,
        window: int = 0,
        shuffle: bool = False,
        impl: str = "fast",
    ) -> None:
        super().__init__()
        if not backbone.supports_hidden:
            raise UserError(
                f"MaskFeat hides patches, and {type(backbone).__name__} has no mask token: it supports ViT and MViTv2 "
                "(MODEL.ARCH), built with one"
            )
        height, width = backbone.token_pixels
        if height != width or height % cell:
            raise UserError(
                f"an output token stands for {height} x {width} pixels, which MASK.HOG_CELL = {cell} does not divide "
                "into whole cells of a square: change MASK.HOG_CELL or the crop and patch sizes"
            )
        self.backbone = backbone
        self.bins, self.cell, self.window, self.shuffle, self.impl = bins, cell, window, shuffle, impl
        self.cells = height // cell
        self.hogs = nn.ModuleList([_SobelBuffers()])
        self.pred_head = _PredictionHead(backbone.width, 3 * bins * self.cells**2)

    def hidden_tokens(self, batch: Batch) -> Tensor:
        """Return (B, prod(grid)) bool: the batch's mask on the output grid, flattened.

        Raises:
            UserError: the batch has no mask.
            ValueError: the mask has another number of axes than the grid.
        """
        if batch.hidden is None:
            raise UserError("MaskFeat got a batch without a mask: set AUG.GEN_MASK_LOADER True")
        return resize_mask(batch.hidden, self.backbone.grid).flatten(1)

    def target(self, clip: Tensor) -> Tensor:
        """Compute the HOG features of every token.

        Args:
            clip: (B, 3, [T,] H, W), normalised and unmasked.

        Returns:
            (B, prod(grid), F) float32
        """
        with full_precision(clip):
            images = clip.float()
            if images.dim() == 5:
                # Every frame_stride-th frame, as many as the output grid has: (B T', 3, H, W).
                images = images[:, :, :: self.backbone.frame_stride].transpose(1, 2).flatten(0, 1)
            features = hog_tokens(hog(images, self.bins, self.cell, self.window, self.impl), self.cells)
        return features.reshape(len(clip), math.prod(self.backbone.grid), -1)

    def features(self, patches: Tensor, weight: Tensor | None) -> Tensor:
        """Compute the features of patches with their border, see `patch_features`: (n, 3, S + 2, S + 2) -> (n, F)."""
        return patch_features(patches, self.bins, self.cell, weight)

    @torch.no_grad()
    def target_at(self, clip: Tensor, tokens: Tensor) -> Tensor:
        """Compute the HOG features of selected tokens, equal to those of `target`.

        Args:
            clip: (B, 3, [T,] H, W), normalised and unmasked.
            tokens: (B, K) int64, indices into the flattened grid.

        Returns:
            (B, K, F) float32
        """
        if is_reference(self.impl):
            target = self.target(clip)
            return target.gather(1, tokens.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
        frames, rows, columns = self.backbone.grid if clip.dim() == 5 else (1, *self.backbone.grid)
        with full_precision(clip):
            images = clip.float() if clip.dim() == 5 else clip.float().unsqueeze(2)
            padded = pad_border(images[:, :, :: self.backbone.frame_stride])
            sample = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1])
            index = tokens.flatten()
            frame, row, column = index // (rows * columns), index // columns % rows, index % columns
            side = self.backbone.token_pixels[0]
            patches = cut_patches(padded, (sample, frame, row, column), side)
            weight = pixel_weights(clip, self.cell, self.window)
            if weight is not None:
                weight = weight.float().reshape(rows, side, columns, side)[row, :, column].unsqueeze(1)
            return self.features(patches, weight).view(*tokens.shape, -1)

    def chosen(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return which tokens are predicted: (B, K) int64 indices into the flattened grid, hidden ones first and in
        order, and (B, K) bool, which of them are hidden. The others pad the rows of samples with fewer hidden tokens.

        K comes from `batch.max_hidden`, so that no host-device synchronization is needed to count the mask. Without it
        the mask is counted.
        """
        hidden = self.hidden_tokens(batch)
        if batch.max_hidden is None or can_be_read(hidden):
            most = int(hidden.sum(dim=1).max())
        else:
            assert batch.hidden is not None
            most = most_hidden_tokens(batch.max_hidden, batch.hidden.shape[1:], self.backbone.grid)
        order = hidden.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : max(most, 1)]
        return order, hidden.gather(1, order)

    def weight(self, batch: Batch) -> Tensor:
        return self.hidden_tokens(batch).sum().float()

    def predict_at(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Predict the HOG of selected tokens (B, K): (B, K, F), in the dtype of the head."""
        patches = self.backbone.forward_tokens(batch.clip, batch.hidden).patches
        return self.pred_head(patches.gather(1, tokens.unsqueeze(-1).expand(-1, -1, patches.shape[-1])))

    def hidden_target(self, batch: Batch) -> Tensor:
        """Return (n, F) float32: the targets of `predict_hidden`."""
        tokens, hidden = self.chosen(batch)
        return self.target_at(batch.clip, tokens)[hidden]

    def predict_hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (prediction, target), both (n, F): the prediction in the dtype of the head, the target in float32."""
        tokens, hidden = self.chosen(batch)
        return self.predict_at(batch, tokens)[hidden], self.target_at(batch.clip, tokens)[hidden]

    def forward(self, batch: Batch) -> StepOutput:
        """Return the mean squared error over hidden tokens and features; metrics: those of two constant guesses."""
        tokens, valid = self.chosen(batch)
        whose = batch.clip.roll(1, dims=0) if self.shuffle and self.training else batch.clip
        target = self.target_at(whose, tokens)
        prediction = self.predict_at(batch, tokens).float()
        hidden = valid.unsqueeze(-1)
        count = hidden.sum().clamp(min=1)
        terms = count * target.shape[-1]
        mean = (target * hidden).sum(dim=(0, 1)) / count
        loss = ((prediction - target).square() * hidden).sum() / terms
        metrics = {
            "zero_predictor": (target.square() * hidden).sum() / terms,
            "mean_hog_predictor": ((target - mean).square() * hidden).sum() / terms,
        }
        return StepOutput(loss, metrics)

    def picture_rows(self, batch: Batch, mean: Sequence[float], std: Sequence[float]) -> list[HogRow]:
        return hog_rows(self, batch, mean, std)

    def load_rules(self, state: Mapping[str, Tensor]) -> LoadRules:
        return LoadRules(fresh=("hogs.*",))


def _keys(cfg: CfgNode) -> None:
    cfg.MASK = CfgNode()
    cfg.MASK.ENABLE = False  # masked pre-training
    cfg.MASK.PRETRAIN_DEPTH = [15]  # the block whose output is predicted from: only [MVIT.DEPTH - 1]
    cfg.MASK.HEAD_TYPE = "separate"  # only "separate": a linear head
    cfg.MASK.PRED_HOG = False  # predict histograms of oriented gradients
    cfg.MASK.HOG_BINS = 9  # ours: orientations
    cfg.MASK.HOG_CELL = 8  # ours: side of a histogram's cell in pixels
    cfg.MASK.HOG_GAUSSIAN_WINDOW = 0  # ours: side in pixels of a Gaussian weight on gradients; 0 = none
    # ours, a control: in training each image is to predict the targets of another one of its (micro-)batch
    cfg.MASK.SHUFFLE_TARGETS = False
    cfg.MASK.MAE_ON = False  # only False
    cfg.MASK.MAE_RND_MASK = False  # only False
    cfg.MASK.PER_FRAME_MASKING = False  # only False


def _check(cfg: CfgNode) -> Iterator[str]:
    yield from check_patch_masks(cfg)
    if cfg.MASK.SHUFFLE_TARGETS and max(cfg.AUG.NUM_SAMPLE, cfg.AUG.REPEATS) > 1:
        yield (
            "AUG.NUM_SAMPLE and AUG.REPEATS must be 1 where MASK.SHUFFLE_TARGETS is True (the next image of a batch "
            f"would be the same one); given {cfg.AUG.NUM_SAMPLE} and {cfg.AUG.REPEATS}"
        )
    yield from _alone(cfg)
    if backbone_spec(cfg) is not TRANSFORMER:
        return  # what other backbones make of a clip is known once they are built
    last = cfg.MVIT.DEPTH - 1
    if list(cfg.MASK.PRETRAIN_DEPTH) != [last]:
        yield (
            f"MASK.PRETRAIN_DEPTH must be [{last}], the last block of MVIT.DEPTH {cfg.MVIT.DEPTH}; "
            f"given {cfg.MASK.PRETRAIN_DEPTH}; set MASK.PRETRAIN_DEPTH or MVIT.DEPTH"
        )
    yield from _targets(cfg)


def _alone(cfg: CfgNode) -> Iterator[str]:
    """Yield that a forward pass of training has one sample, which has no other one to take the targets of."""
    train, processes = cfg.TRAIN, max(cfg.NUM_GPUS, 1)
    share = max(train.BATCH_SIZE // processes, 1)
    forward = min(train.MICRO_BATCH_SIZE or share, share)
    if cfg.MASK.SHUFFLE_TARGETS and train.ENABLE and (share % forward or forward) < 2:
        mend = "set TRAIN.MICRO_BATCH_SIZE" if share > 1 else "raise TRAIN.BATCH_SIZE, or lower NUM_GPUS"
        yield (
            "MASK.SHUFFLE_TARGETS True needs two samples or more in every forward pass (one alone would keep its own "
            f"targets), and one has 1; given TRAIN.BATCH_SIZE {train.BATCH_SIZE}, NUM_GPUS {cfg.NUM_GPUS} and "
            f"TRAIN.MICRO_BATCH_SIZE {train.MICRO_BATCH_SIZE}: {mend}"
        )


def _targets(cfg: CfgNode) -> Iterator[str]:
    """Yield problems of HOG cells and masks on the token grids (t, h, w) of the stem and of the last block."""
    mvit = cfg.MVIT
    stride = (1, *mvit.PATCH_STRIDE)[-3:]
    frames, crop = cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE
    size = (frames, crop, crop)[-len(mvit.PATCH_STRIDE) :]
    made = conv_grid(size, mvit.PATCH_KERNEL, mvit.PATCH_STRIDE, mvit.PATCH_PADDING)
    stem = divided(size, mvit.PATCH_STRIDE)
    if made != stem:
        yield (
            f"MVIT.PATCH_KERNEL {mvit.PATCH_KERNEL} and MVIT.PATCH_PADDING {mvit.PATCH_PADDING} make {list(made)} "
            f"tokens of {list(size)} frames and pixels, and pre-training needs one for each step of MVIT.PATCH_STRIDE "
            f"{mvit.PATCH_STRIDE}, which has the targets: a padding of half the kernel, rounded down, does"
        )
    pooled = [math.prod(entry[axis] for entry in mvit.POOL_Q_STRIDE) for axis in (1, 2, 3)]
    if pooled[0] != 1:
        yield (
            f"MVIT.POOL_Q_STRIDE must not pool time in pre-training: every frame of the stem has a target; "
            f"given a stride of {pooled[0]} in all"
        )
    for side in {s * q for s, q in zip(stride[1:], pooled[1:], strict=True)}:
        if side % cfg.MASK.HOG_CELL or crop % side:
            yield (
                f"a token of the last block covers {side} pixels (MVIT.PATCH_STRIDE x MVIT.POOL_Q_STRIDE): "
                f"it must be a multiple of MASK.HOG_CELL ({cfg.MASK.HOG_CELL}), and DATA.TRAIN_CROP_SIZE "
                f"({crop}) a multiple of it"
            )
    if mvit.PATCH_2D:
        return
    tokens = [size // q for size, q in zip(stem, pooled, strict=True)]
    window = cfg.AUG.MASK_WINDOW_SIZE
    fits = all(s % w == 0 for s, w in zip(stem, window, strict=True))
    meets = all(t and (t % w == 0 or w % t == 0) for t, w in zip(tokens, window, strict=True))
    if not (fits and meets):
        yield (
            f"AUG.MASK_WINDOW_SIZE must divide the stem's grid {list(stem)} (DATA.NUM_FRAMES and "
            f"DATA.TRAIN_CROP_SIZE over MVIT.PATCH_STRIDE) and be a whole multiple or part of the last "
            f"block's {tokens}; given {window}; {tokens} would do"
        )


def build_maskfeat(cfg: CfgNode, backbone: Backbone) -> MaskFeat:
    """Return MaskFeat as the section MASK describes it."""
    mask = cfg.MASK
    return MaskFeat(
        backbone,
        bins=mask.HOG_BINS,
        cell=mask.HOG_CELL,
        window=mask.HOG_GAUSSIAN_WINDOW,
        shuffle=mask.SHUFFLE_TARGETS,
    )


register(
    ObjectiveSpec(
        name="MaskMViT",
        title="masked feature prediction",
        build=build_maskfeat,
        losses=("multi_mse",),
        hides_patches=True,
        backbone_hint="MaskFeat hides patches of a ViT or an MViTv2; to pre-train a ResNet, MODEL.MODEL_NAME 'MFM'",
        mask_sampler=sample_patches,
        requires={"MASK.ENABLE": True, "MASK.PRED_HOG": True},
        keys=_keys,
        architecture=("MASK.PRETRAIN_DEPTH", "MASK.HOG_BINS", "MASK.HOG_CELL"),
        kinds={"MASK.PRETRAIN_DEPTH": "list[int]"},
        choices={
            "MASK.HEAD_TYPE": ("separate",),
            "MASK.MAE_ON": (False,),
            "MASK.MAE_RND_MASK": (False,),
            "MASK.PER_FRAME_MASKING": (False,),
            # Not read here, but elsewhere it would start from other weights.
            "MASK.SCALE_INIT_BY_DEPTH": (False,),
        },
        ranges={
            "MASK.HOG_BINS": Range(1, 360),
            "MASK.HOG_CELL": Range(1, 1024),
            "MASK.HOG_GAUSSIAN_WINDOW": Range(0, 1024),
        },
        check=_check,
    )
)
