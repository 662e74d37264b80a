"""Reading images with Pillow and torchvision, and clips by decoding a whole file, as most code does.

Shape legend: C channels (3), T frames, H x W pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import functional as TF

from maskfeat.data.video.scaling import Scaler, scaled_size

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""
BICUBIC = transforms.InterpolationMode.BICUBIC


class ReferenceImages(Dataset[tuple[Any, ...]]):
    """Images with labels and masks for torch's DataLoader and its own collate function.

    Args:
        samples: [(path, label)].
        crop: side of the result in pixels.
        scale, ratio: of the random resized crop.
        mean, std: RGB, of pixels in [0, 1].
        draw_hidden: draws the mask of a sample from its index.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        crop: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        mean: Sequence[float],
        std: Sequence[float],
        draw_hidden: Callable[[int], Tensor],
    ) -> None:
        self.samples, self.draw_hidden = samples, draw_hidden
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(crop, scale, ratio, BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        path, label = self.samples[index]
        image = Image.open(path).convert("RGB")
        return self.transform(image), label, self.draw_hidden(index)


def reference_image(path: str, box: Box, flip: bool, crop: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The same with given draws: (C, crop, crop) float32."""
    image = TF.resized_crop(Image.open(path).convert("RGB"), *box, [crop, crop], BICUBIC)
    if flip:
        image = TF.hflip(image)
    return TF.normalize(TF.to_tensor(image), list(mean), list(std))


def decode_all(path: str, short_side: int | None = None) -> np.ndarray:
    """Every frame of a video, scaled to a short side by averaging areas: (T, H, W, C) uint8 RGB."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the workers of a loader are the parallelism
        frames, scaler = container.decode(stream), Scaler()
        return np.stack([scaler.to_rgb(f, *scaled_size(f.height, f.width, short_side)) for f in frames])


def reference_clip(
    path: str,
    pick: Callable[[int], Sequence[int]],
    draw_box: Callable[[int, int], Box],
    draw_flip: Callable[[], bool],
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    short_side: int | None = None,
) -> Tensor:
    """A clip: (C, T, crop, crop) float32.

    Args:
        pick: the numbers of the frames of a clip, from the length of the video.
        draw_box: the box of the crop, from height and width.
        draw_flip: whether to mirror.
        crop, mean, std: as in `ReferenceImages`.
        short_side: that frames are scaled to before the crop; None = their own.
    """
    frames = decode_all(path, short_side)
    clip = torch.from_numpy(frames[list(pick(len(frames)))]).float() / 255
    clip = ((clip - torch.tensor(mean)) / torch.tensor(std)).permute(3, 0, 1, 2)
    top, left, height, width = draw_box(*clip.shape[-2:])
    clip = clip[..., top : top + height, left : left + width]
    clip = F.interpolate(clip, size=(crop, crop), mode="bilinear", align_corners=False)
    return clip.flip(-1) if draw_flip() else clip
