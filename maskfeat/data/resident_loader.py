"""A loader for data sets of small images: decodes them once and keeps all of them on the device.

Cropping, flipping and masking run on the device. For images of 32 x 32 pixels, decoding and sending every batch would
take longer than a training step on a GPU.

Shape legend: N images, B in a batch, P masks, h x w pixels as stored, S x S after cropping, (gh, gw) the mask grid.
"""

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskfeat.batch import BadSample, Batch
from maskfeat.data.bad_samples import BadSampleLog, error_context, read_with_fallback
from maskfeat.data.datasets.imagenet import ImageFolder
from maskfeat.data.device_transforms import normalisation
from maskfeat.data.loader import BatchLoader, CollateOrError, ErrorsAsItems, raising, worker_options
from maskfeat.data.rng import MASK_STREAM, VIEW_STREAM, draw_mask, sample_generator
from maskfeat.data.samplers import EpochSampler
from maskfeat.data.transforms import ImageEvalTransform, ImageTrainTransform, as_tensor
from maskfeat.distributed.processes import signals_blocked
from maskfeat.errors import UserError

logger = logging.getLogger(__name__)

NUM_MASKS = 16384
"""Masks drawn in advance for training; with their flipped versions there are four times as many."""
_MAX_TRIES = 10
_DECODE_BATCH_SIZE = 256


class _DecodedImages(Dataset[tuple[Tensor, int, tuple[BadSample, ...]]]):
    """Pixels (h, w, 3) uint8 of each image, the index of the sample that they were read from, and its bad samples."""

    def __init__(self, images: ImageFolder) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, tuple[BadSample, ...]]:
        images, transform = self.images, self.images.transform
        image, index, bad = read_with_fallback(images, lambda index: images.read(images.path(index)), index)
        if image is None:
            return torch.zeros(transform.crop, transform.crop, 3, dtype=torch.uint8), index, bad
        if isinstance(transform, ImageEvalTransform):  # not random: keep its result
            with error_context(images.path(index)):
                return transform(image).pixels, index, bad
        return as_tensor(image), index, bad


@dataclass
class _EpochDraws:
    """Random crop, flip and mask of every sample in an epoch, on the device: a function of seed, epoch and sample only.

    Attributes:
        boxes: (N, 4) float32: top, left, height, width of the crop in pixels.
        flip: (N,) bool.
        mask: (N,) int64, indices of the masks; None without masking.
    """

    boxes: Tensor
    flip: Tensor
    mask: Tensor | None


def random_crop_boxes(
    uniform: np.ndarray, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> np.ndarray:
    """Compute the boxes of torchvision's RandomResizedCrop for many images at once.

    Args:
        uniform: (N, tries, 4) random numbers in [0, 1).
        height, width: of the images.
        scale, ratio: see `transforms.random_resized_crop_box`.

    Returns:
        (N, 4) float64 whole numbers: top, left, height, width of the first try that fits into the image, or of the
        largest central box whose aspect ratio is within `ratio`.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[..., 0])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * uniform[..., 1])
    wide, tall = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    rows, first = np.arange(len(uniform)), fits.argmax(axis=1)
    tall, wide, draw, found = tall[rows, first], wide[rows, first], uniform[rows, first], fits.any(axis=1)
    top, left = np.floor(draw[:, 2] * (height - tall + 1)), np.floor(draw[:, 3] * (width - wide + 1))
    last_tall, last_wide = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    centre = ((height - last_tall) // 2, (width - last_wide) // 2, last_tall, last_wide)
    return np.where(found[:, None], np.stack([top, left, tall, wide], axis=1), np.array(centre, dtype=np.float64))


def crop_and_resize(images: Tensor, boxes: Tensor, flip: Tensor, side: int) -> Tensor:
    """Crop, resize and flip a batch of images.

    Args:
        images: (B, 3, h, w) float32.
        boxes: (B, 4) float32: top, left, height, width.
        flip: (B,) bool, the images to flip horizontally.
        side: of the result.

    Returns:
        (B, 3, side, side) float32, resized bilinearly, without antialiasing, from the pixels inside the box only.
    """
    height, width = images.shape[2:]
    steps = (torch.arange(side, device=images.device) + 0.5) / side
    flipped = torch.where(flip[:, None], steps.flip(0), steps)
    coordinates = []
    axes = ((boxes[:, 0], boxes[:, 2], height, steps), (boxes[:, 1], boxes[:, 3], width, flipped))
    for start, length, size, along in axes:
        inside = (along * length[:, None] - 0.5).clamp(min=0).minimum(length[:, None] - 1)
        # -1 and 1 are the centres of the outer pixels.
        coordinates.append((start[:, None] + inside) * (2 / max(size - 1, 1)) - 1)
    y, x = coordinates
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)


class ResidentLoader(BatchLoader):
    """Batches of an image data set that is kept on the device.

    In evaluation, pixels and masks equal those of `Loader`. In training, crops and flips come from random numbers of
    its own, a function of (seed, epoch, sample) only; images are resized bilinearly; and masks are taken from
    `NUM_MASKS` masks drawn in advance.

    Args:
        dataset: the images; in training they must have one size.
        sampler, bad_samples, device: see `Loader`.
        num_workers: number of processes that decode; 0 = decode in this process.

    Raises:
        UserError: images of several sizes.
        TooManyBadSamples: more than DATA.MAX_BAD_FRACTION cannot be read.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        sampler: EpochSampler,
        bad_samples: BadSampleLog | None = None,
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(dataset, sampler, device)
        self.dataset: ImageFolder = dataset
        self.transform = dataset.transform
        self._bad: dict[int, BadSample] = {}
        started = time.perf_counter()
        pixels, indices = self._read(bad_samples, num_workers)
        self._pixels = pixels.to(self.device)
        self._indices = indices.to(self.device)
        self._labels = torch.tensor(dataset.labels)[indices].to(self.device)
        self._masks, self.max_hidden = self._draw_masks()
        logger.info(
            "%d images of %d x %d pixels decoded in %.1f s and kept on %s: %.0f MB",
            len(pixels),
            *pixels.shape[1:3],
            time.perf_counter() - started,
            self.device,
            pixels.nbytes / 1e6,
        )

    def _read(self, bad_samples: BadSampleLog | None, num_workers: int) -> tuple[Tensor, Tensor]:
        """Decode all images: (N, h, w, 3) uint8, and (N,) int64, the index of the sample that each was read from."""
        loader: DataLoader[Any] = DataLoader(
            ErrorsAsItems(_DecodedImages(self.dataset)),
            _DECODE_BATCH_SIZE,
            num_workers=num_workers,
            collate_fn=CollateOrError(list),
            generator=torch.Generator(),  # not the global one, see `Loader`
            **worker_options(num_workers),
        )
        if num_workers > 0:
            gc.collect()  # garbage of this process must not be collected in a forked worker
        with signals_blocked():
            chunks = iter(loader)
        pixels: list[Tensor] = []
        indices: list[int] = []
        for chunk in raising(chunks):
            for image, index, bad in chunk:
                if pixels and image.shape != pixels[0].shape:
                    sizes = " and ".join(f"{shape[1]}x{shape[0]}" for shape in (pixels[0].shape, image.shape))
                    raise UserError(
                        f"{self.dataset.path(index)}: images of {sizes} pixels; DATA_LOADER.RESIDENT takes data sets "
                        "of one size: set it to False"
                    )
                pixels.append(image.clone())  # out of the memory shared with the worker
                indices.append(index)
                if bad and not self.dataset.replace_bad:
                    self._bad[index] = bad[0]
                if bad_samples is not None:
                    bad_samples.record(bad, (index,))
        return torch.stack(pixels), torch.tensor(indices)

    @property
    def _training(self) -> bool:
        return isinstance(self.transform, ImageTrainTransform)

    def _draw_masks(self) -> tuple[Tensor | None, int | None]:
        """Draw masks (P, gh, gw) bool on the device, and return also the largest number of patches that one hides.

        In training they are `NUM_MASKS` masks and their flips along either axis and both, which are as likely as the
        masks themselves; in evaluation one mask per sample.
        """
        sampler, seed = self.dataset.draw_hidden, self.dataset.seed
        if sampler is None:
            return None, None
        if self._training:
            drawn = [sampler(sample_generator(seed, 0, number, 0, MASK_STREAM)) for number in range(NUM_MASKS)]
            masks = torch.from_numpy(np.stack(drawn))
            masks = torch.cat([masks, masks.flip(1), masks.flip(2), masks.flip(1, 2)])
        else:
            per_sample = [draw_mask(sampler, seed, 0, index, 0) for index in range(len(self.dataset))]
            masks = torch.stack([mask for mask in per_sample if mask is not None])
        return masks.to(self.device), int(masks.flatten(1).sum(dim=1).max())

    def _draw_epoch(self, epoch: int) -> _EpochDraws:
        """Draw the crops, flips and masks of a training epoch."""
        assert isinstance(self.transform, ImageTrainTransform)
        number, (height, width) = len(self.dataset), self._pixels.shape[1:3]
        rng = np.random.default_rng(np.random.SeedSequence((self.dataset.seed, epoch, number, VIEW_STREAM)))
        uniform = rng.random((number, _MAX_TRIES, 4), dtype=np.float32)
        boxes = random_crop_boxes(uniform, height, width, self.transform.scale, self.transform.ratio)
        flip = (rng.random(number) < 0.5) & self.transform.flip
        mask = None if self._masks is None else rng.integers(0, len(self._masks), number)
        return _EpochDraws(
            torch.from_numpy(boxes.astype(np.float32)).to(self.device),
            torch.from_numpy(flip).to(self.device),
            None if mask is None else torch.from_numpy(mask).to(self.device),
        )

    def _make_batch(self, index: Tensor, draws: _EpochDraws | None) -> Batch:
        """Return the batch of the samples `index`, (B,) int64 on the device."""
        shift, scale = normalisation(self.transform.mean, self.transform.std, self.device)
        images = self._pixels[index].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        mask_index = index
        if draws is not None:
            images = crop_and_resize(images, draws.boxes[index], draws.flip[index], self.transform.crop)
            mask_index = index if draws.mask is None else draws.mask[index]
        # As in `transform_images` on that device: a multiply-add in one or two steps rounds differently.
        on_cpu = self.device.type == "cpu"
        return Batch(
            clip=images.mul_(scale).add_(shift) if on_cpu else torch.addcmul(shift, images, scale),
            label=self._labels[index],
            hidden=None if self._masks is None else self._masks[mask_index],
            index=self._indices[index],
            max_hidden=self.max_hidden,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches, on the loader's device. Only the order is copied there, once per epoch."""
        draws = self._draw_epoch(self.sampler.epoch) if self._training else None
        rows = [[key.index for key in keys] for keys in self.sampler]
        order = torch.tensor([index for row in rows for index in row], dtype=torch.int64).to(self.device)
        for row, index in zip(rows, order.split([len(row) for row in rows]), strict=True):
            batch = self._make_batch(index, draws)
            unreadable = [position for position, sample in enumerate(row) if sample in self._bad]
            if unreadable:
                batch.clip[unreadable] = 0.0
                batch = replace(batch, bad=tuple(self._bad[row[position]] for position in unreadable))
            yield batch

    def iter_samples(self, indices: Sequence[int]) -> Iterator[Batch]:
        draws = self._draw_epoch(0) if self._training else None
        for index in indices:
            replaced = int(self._indices[index]) != index
            if index not in self._bad and not replaced:
                yield self._make_batch(torch.tensor([index], device=self.device), draws)
