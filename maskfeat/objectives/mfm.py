"""MFM: predict the frequencies that were removed from an image (Xie et al., ICLR 2023).

The two published variants differ only in the values of the arguments of `MFM`.

Shape legend: B images, H x W pixels and frequencies, C target channels (1 or 3).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from maskfeat.batch import Batch, StepOutput
from maskfeat.checkpoint.weights import LoadRules
from maskfeat.errors import UserError
from maskfeat.masking import MaskSampler, band_sampler
from maskfeat.models.base import Backbone, check_clip_size
from maskfeat.models.heads import token_norm
from maskfeat.models.layers import full_precision
from maskfeat.objectives.base import Objective
from maskfeat.objectives.predictions import LUMA, spectrum_rows
from maskfeat.objectives.spectrum import Frequencies, disc, half_of, magnitude
from maskfeat.pictures import SpectrumRow
from maskfeat.registry import SHARE, ObjectiveSpec, Range, backbone_spec, register


class MFM(Objective):
    """Predict an image from its low or its high frequencies; the loss is the spectral distance on the removed ones.

    A batch's `hidden` is (B, H, W) bool: the removed frequencies of the shifted spectrum; or, as the loader samples it,
    (B, 1, 1) bool: True = the disc of low frequencies is removed, False = everything else is. Where it is None, it is
    sampled here, on the batch's device.

    Args:
        backbone: of images, ResNet or transformer.
        mean, std: RGB statistics by which the loader normalised the images.
        radius: of the disc of low frequencies.
        low_pass: probability that an image keeps the disc and loses the rest, where it is sampled here.
        target_channels: 1 = the grey image, 3 = the normalised channels.
        filter_normalised: filter the normalised image; otherwise filter the image in [0, 1], clamp it and normalise it.
        modulus: invert by the modulus, otherwise by the real part.
        gamma, eps: of the distance of two frequencies, see `magnitude`.
        mean_per_image: average over the removed frequencies of each image, then over images and channels; otherwise
            over all of them at once.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        radius: float = 16.0,
        low_pass: float = 0.5,
        target_channels: int = 1,
        filter_normalised: bool = True,
        modulus: bool = True,
        gamma: float = 1.0,
        eps: float = 1e-7,
        mean_per_image: bool = True,
    ) -> None:
        super().__init__()
        if len(backbone.clip_size) != 2:
            raise UserError(
                "MFM is for images (TRAIN.DATASET imagenet, MVIT.PATCH_2D True), and got a backbone of clips"
            )
        height, width = backbone.clip_size
        stride = backbone.token_pixels[0]
        if backbone.token_pixels != (stride, stride) or height % stride or width % stride:
            raise UserError(
                f"{height} x {width} pixels are not made of whole square tokens of {backbone.token_pixels}: MFM needs "
                "a DATA.TRAIN_CROP_SIZE that is a multiple of them"
            )
        self.backbone = backbone
        self.low_pass, self.target_channels = low_pass, target_channels
        self.filter_normalised, self.modulus = filter_normalised, modulus
        self.gamma, self.eps, self.mean_per_image = gamma, eps, mean_per_image
        self.norm = token_norm(backbone)
        self.decoder = nn.Sequential(
            nn.Conv2d(backbone.width, target_channels * stride**2, kernel_size=1), nn.PixelShuffle(stride)
        )
        low = disc(height, width, radius)
        self._width = width if height % 2 == width % 2 == 0 else 0
        self.register_buffer("_low", (half_of(low) if self._width else low).contiguous(), persistent=False)
        for name, value in (("_luma", LUMA), ("_mean", mean), ("_std", std)):
            self.register_buffer(name, torch.tensor(value).reshape(1, 3, 1, 1), persistent=False)

    _low: Tensor
    _luma: Tensor
    _mean: Tensor
    _std: Tensor

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with a mask, which is sampled here if the loader has sampled none."""
        if batch.hidden is not None:
            return batch
        return replace(batch, hidden=torch.rand(len(batch), 1, 1, device=batch.clip.device) >= self.low_pass)

    def removed(self, batch: Batch) -> Frequencies:
        """Return the frequencies that `batch.hidden`, which must not be None, removes.

        Raises:
            UserError: the masks are neither of the size of the images nor (B, 1, 1).
        """
        hidden = batch.hidden
        assert hidden is not None
        size = self.backbone.clip_size
        if hidden.shape[1:] == (1, 1):
            return Frequencies(torch.where(hidden, self._low, ~self._low).unsqueeze(1), self._width)
        if hidden.shape[1:] != size:
            raise UserError(
                f"MFM got masks of shape {tuple(hidden.shape)}, expected (B, {size[0]}, {size[1]}): one value for each "
                "frequency of an image of DATA.TRAIN_CROP_SIZE; or (B, 1, 1)"
            )
        return Frequencies(hidden.unsqueeze(1))

    def weight(self, batch: Batch) -> Tensor:
        if self.mean_per_image:
            return super().weight(batch)
        return self.removed(batch).count().sum()

    def filtered(self, clip: Tensor, removed: Frequencies) -> Tensor:
        """Return the input of the backbone for clip (B, 3, H, W) float32: same shape and normalisation."""
        if self.filter_normalised:
            return removed.remove(clip, self.modulus)
        pixels = removed.remove(clip * self._std + self._mean, self.modulus)
        return (pixels.clamp(0.0, 1.0) - self._mean) / self._std

    def target(self, clip: Tensor) -> Tensor:
        """Return the image whose spectrum is the target: clip (B, 3, H, W) -> (B, C, H, W) float32."""
        return (clip * self._luma).sum(dim=1, keepdim=True) if self.target_channels == 1 else clip

    def predict_image(self, seen: Tensor) -> Tensor:
        """Predict the image from a filtered one: (B, 3, H, W) -> (B, C, H, W)."""
        tokens = self.backbone.forward_tokens(seen)
        patches = self.norm(tokens.patches).transpose(1, 2)
        return self.decoder(patches.reshape(len(seen), -1, *tokens.grid))

    @torch.no_grad()
    def inputs(self, batch: Batch) -> tuple[Frequencies, Tensor, Tensor]:
        """Return what a loss is computed from, without mixed precision.

        Returns:
            the removed frequencies; the input of the backbone (B, 3, H, W) and the target image (B, C, H, W), float32.

        Raises:
            UserError: the images or the masks are of another size than the backbone was built for.
        """
        check_clip_size(batch.clip, self.backbone.clip_size)
        with full_precision(batch.clip):
            clip = batch.clip.float()
            removed = self.removed(batch)
            return removed, self.filtered(clip, removed), self.target(clip)

    def forward(self, batch: Batch) -> StepOutput:
        """Return the mean distance over removed frequencies; the metric is the loss of predicting zeros."""
        batch = self.prepare(batch)
        removed, seen, target = self.inputs(batch)
        prediction = self.predict_image(seen)
        with full_precision(batch.clip):
            counts = removed.count().clamp(min=1)
            loss = self.loss(prediction.float(), target, removed, counts)
            with torch.no_grad():
                nothing = self.loss(torch.zeros_like(target), target, removed, counts)
        return StepOutput(loss, {"zero_predictor": nothing})

    def loss(self, prediction: Tensor, target: Tensor, removed: Frequencies, counts: Tensor) -> Tensor:
        """Return the mean distance of the spectra of two images (B, C, H, W) over removed frequencies, a scalar.

        There are `counts` (B, 1) of them; the gradient of the other frequencies is zero.
        """
        # The transform is linear: the difference of two spectra is the spectrum of the difference.
        sums = removed.sum(magnitude(removed.transform(prediction - target), self.gamma, self.eps))
        if self.mean_per_image:
            return (sums / counts).mean()
        return sums.sum() / (counts.sum() * sums.shape[1])

    def picture_rows(self, batch: Batch, mean: Sequence[float], std: Sequence[float]) -> list[SpectrumRow]:
        return spectrum_rows(self, batch, mean, std)

    def load_rules(self, state: Mapping[str, Tensor]) -> LoadRules:
        if any(name.startswith("decoder.") for name in state):
            return LoadRules()
        # Pre-training may start from a classifier: it has no decoder, and its head is of no use.
        return LoadRules(fresh=("decoder.*",), dropped=(f"{self.backbone.classifier}*",))


def _keys(cfg: CfgNode) -> None:
    """All ours. The defaults are the ResNet-50 recipe's; the other published variant is in1k_R50_MFM_paper_PT."""
    cfg.MFM = CfgNode()
    cfg.MFM.RADIUS = 16.0  # of the disc of low frequencies around frequency 0, in frequencies
    cfg.MFM.LOW_PASS_PROB = 0.5  # probability, 0 .. 1, that the disc stays and the rest is removed; or the reverse
    cfg.MFM.FILTER_NORMALISED = True  # filter the normalised image; False: that in [0, 1], then clamp and normalise it
    cfg.MFM.INVERSE = "modulus"  # what is taken of the inverse FFT: its "modulus" | its "real" part
    cfg.MFM.TARGET_CHANNELS = 1  # spectrum of the grey image; 3 = of the three normalised channels
    cfg.MFM.GAMMA = 1.0  # exponent of the distance of two frequencies
    cfg.MFM.EPS = 1e-7  # below the square root of that distance
    cfg.MFM.MEAN_PER_IMAGE = True  # average over each image's removed frequencies first; False: over all at once


def _check(cfg: CfgNode) -> Iterator[str]:
    crop, backbone = cfg.DATA.TRAIN_CROP_SIZE, backbone_spec(cfg)
    if backbone.token_pixels and crop % backbone.token_pixels:
        side = backbone.token_pixels
        yield (
            f"DATA.TRAIN_CROP_SIZE must be a multiple of {side} to pre-train MODEL.ARCH {cfg.MODEL.ARCH!r}, which "
            f"makes one token of {side} x {side} pixels; given {crop}"
        )
    if crop / 2 < cfg.MFM.RADIUS:
        yield (
            f"MFM.RADIUS must be at most half of DATA.TRAIN_CROP_SIZE ({crop}), or little is left outside of the disc; "
            f"given {cfg.MFM.RADIUS:g}"
        )


def _sample_bands(cfg: CfgNode, grid: tuple[int, ...]) -> MaskSampler:
    """Return the sampler of the band of frequencies that is removed."""
    return band_sampler(cfg.MFM.LOW_PASS_PROB)


def build_mfm(cfg: CfgNode, backbone: Backbone) -> MFM:
    """Return MFM as the sections MFM and DATA describe it."""
    mfm = cfg.MFM
    return MFM(
        backbone,
        mean=cfg.DATA.MEAN,
        std=cfg.DATA.STD,
        radius=mfm.RADIUS,
        low_pass=mfm.LOW_PASS_PROB,
        target_channels=mfm.TARGET_CHANNELS,
        filter_normalised=mfm.FILTER_NORMALISED,
        modulus=mfm.INVERSE == "modulus",
        gamma=mfm.GAMMA,
        eps=mfm.EPS,
        mean_per_image=mfm.MEAN_PER_IMAGE,
    )


register(
    ObjectiveSpec(
        name="MFM",
        title="masked frequency modelling",
        build=build_mfm,
        losses=("frequency",),
        media=("image",),
        mask_sampler=_sample_bands,
        requires={"MASK.ENABLE": False, "MASK.PRED_HOG": False},
        keys=_keys,
        architecture=("MFM.TARGET_CHANNELS",),
        choices={"MFM.INVERSE": ("modulus", "real"), "MFM.TARGET_CHANNELS": (1, 3)},
        ranges={
            "MFM.RADIUS": Range(0, 8192, above=True),  # and at most half of the crop, see `_check`
            "MFM.GAMMA": Range(0, 10, above=True),
            "MFM.EPS": Range(0, 1, above=True),
            "MFM.LOW_PASS_PROB": SHARE,
        },
        check=_check,
    )
)
