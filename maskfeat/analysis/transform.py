"""What a trained network is shown of files, pictures and arrays."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.batch import SampleKey
from maskfeat.data.collate import collate
from maskfeat.data.datasets.base import DatasetRequest
from maskfeat.data.datasets.imagenet import build_image_folder
from maskfeat.data.datasets.kinetics import build_video_clips
from maskfeat.data.image_reader import upright_rgb
from maskfeat.data.sample import Sample
from maskfeat.data.video.temporal_sampling import frame_indices
from maskfeat.errors import UserError
from maskfeat.models.base import Backbone
from maskfeat.registry import tests_at_any_size

_A = {"image": "an image", "video": "a video"}


def shown_size(cfg: CfgNode, backbone: Backbone) -> CfgNode:
    """Return the config with the one size that the network takes; that of a pre-training may name another for tests."""
    side = backbone.clip_size[-1]
    if tests_at_any_size(cfg) or side == cfg.DATA.TEST_CROP_SIZE:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATA.TEST_CROP_SIZE = side
    cfg.freeze()
    return cfg


class Transform:
    """Turns an input into what a network is shown of it. It has no weights: data workers may take it along.

    Args:
        cfg: of the network.
        media: "image" or "video".
        source: what the network is called in messages.
    """

    def __init__(self, cfg: CfgNode, media: str, source: str) -> None:
        self.cfg, self.media, self.source = cfg, media, source

    def __call__(self, what: Any) -> Tensor:
        """Return what the network is shown of an input in evaluation: the central view, resized, cropped, normalised.

        Args:
            what: the path of an image or a video; a Pillow image; an array or tensor (H, W, 3) uint8 of an image, or
                (T, H, W, 3) uint8 of a clip, whose frames are taken evenly spread over all T; or a list of these.

        Returns:
            (3, [T,] H, W) float32 on the CPU; of a list (B, 3, [T,] H, W).

        Raises:
            UserError: a file cannot be read, or an input is of another medium than `media`.
        """
        if isinstance(what, list | tuple):
            if not what:
                raise UserError("no inputs were given: the list is empty")
            build = build_image_folder if self.media == "image" else build_video_clips
            paths = [(os.fspath(one) if isinstance(one, str | os.PathLike) else "", 0) for one in what]
            dataset = build(self.cfg, DatasetRequest("val", augmented=False), paths)
            samples = [[self._sample(dataset, index, one)] for index, one in enumerate(what)]
            return collate(samples).to_batch(torch.device("cpu")).clip
        return self([what])[0]

    def _sample(self, dataset: Any, index: int, what: Any) -> Sample:
        """Return an input as the data set, which has its path if it has one, shows it."""
        if isinstance(what, str | os.PathLike):
            (sample,) = dataset[SampleKey(0, index)]
            if sample.bad:
                raise UserError(f"{what} cannot be read as {_A[self.media]}: {sample.bad[0].cause}")
            return sample
        if isinstance(what, Image.Image):
            try:
                what = upright_rgb(what)
            except (OSError, ValueError) as error:
                raise UserError(f"a Pillow image cannot be read as {_A[self.media]}: {error}") from error
        if isinstance(what, Tensor):
            what = what.detach().cpu()
        frames = np.asarray(what)
        axes = 3 if self.media == "image" else 4
        if frames.dtype != np.uint8 or frames.ndim != axes or frames.shape[-1] != 3 or not frames.size:
            raise UserError(
                f"{self.source} takes {_A[self.media]}: a path{', a Pillow image' if axes == 3 else ''} or uint8 of "
                f"shape ({'T, ' if axes == 4 else ''}H, W, 3); given "
                f"{type(what).__name__ if frames.dtype == object else f'{frames.dtype} of shape {frames.shape}'}"
            )
        if axes == 3:
            return dataset.transform(Image.fromarray(frames))
        wanted = frame_indices(0, len(frames) - 1, self.cfg.DATA.NUM_FRAMES, len(frames))
        return dataset.transform(frames[wanted], None)
