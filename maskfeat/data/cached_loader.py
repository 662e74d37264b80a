"""Data sets of small images, kept whole on the device: decoded once; cropped, mirrored and masked where they are used.

Of pictures of 32 x 32 pixels, decoding and sending them batch by batch takes longer than a training step on a GPU.

Shape legend: N images, B in a batch, P masks, h x w pixels as stored, S x S as shown, (gh, gw) the grid of masks.
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
from maskfeat.data.bad_samples import BadSampleLedger, naming_sample
from maskfeat.data.collate import draw_mask, first_readable
from maskfeat.data.datasets.imagenet import ImageFolder
from maskfeat.data.device_transforms import affine
from maskfeat.data.loader import BatchLoader, worker_options
from maskfeat.data.rng import MASK_STREAM, VIEW_STREAM, sample_generator
from maskfeat.data.samplers import EpochSampler
from maskfeat.data.transforms import ImageEvalTransform, ImageTrainTransform, as_tensor
from maskfeat.distributed.processes import signals_blocked

logger = logging.getLogger(__name__)

MASKS = 16384
"""Masks that are drawn once for training; each is shown as it is and mirrored, so that there are four times as many."""
_TRIES = 10
_CHUNK = 256


class _Decoded(Dataset[tuple[Tensor, int, tuple[BadSample, ...]]]):
    """Pixels (h, w, 3) uint8 of an image data set, the place that they come from, and what could not be read."""

    def __init__(self, images: ImageFolder) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, tuple[BadSample, ...]]:
        images, transform = self.images, self.images.transform
        picture, place, bad = first_readable(images, lambda place: images.read(images.path(place)), index)
        if picture is None:
            return torch.zeros(transform.crop, transform.crop, 3, dtype=torch.uint8), place, bad
        if isinstance(transform, ImageEvalTransform):  # which draws nothing: its result is kept
            with naming_sample(images.path(place)):
                return transform(picture).data, place, bad
        return as_tensor(picture), place, bad


@dataclass
class _Draws:
    """What an epoch draws for every sample, on the device: a pure function of seed, epoch and sample.

    Attributes:
        box: (N, 4) float32: top, left, height, width of the crop in pixels.
        mirror: (N,) bool.
        mask: (N,) int64, which of the masks; None where nothing is masked.
    """

    box: Tensor
    mirror: Tensor
    mask: Tensor | None


def draw_boxes(
    uniform: np.ndarray, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> np.ndarray:
    """torchvision's random resized crop for many images at once, see `transforms.random_area_box`.

    Args:
        uniform: (N, tries, 4) in [0, 1).

    Returns:
        (N, 4) float64 of whole numbers: top, left, height, width; the first try that fits, else the largest central box
        of an aspect within `ratio`.
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


def crop_resized(images: Tensor, box: Tensor, mirror: Tensor, side: int) -> Tensor:
    """images (B, 3, h, w) float32, box (B, 4), mirror (B,) bool -> (B, 3, side, side) float32: each box resized
    bilinearly, without antialiasing and from its own pixels alone, and mirrored where that is asked for.
    """
    height, width = images.shape[2:]
    steps = (torch.arange(side, device=images.device) + 0.5) / side
    flipped = torch.where(mirror[:, None], steps.flip(0), steps)
    places = []
    for start, length, size, along in ((box[:, 0], box[:, 2], height, steps), (box[:, 1], box[:, 3], width, flipped)):
        inside = (along * length[:, None] - 0.5).clamp(min=0).minimum(length[:, None] - 1)
        places.append((start[:, None] + inside) * (2 / max(size - 1, 1)) - 1)  # -1 and 1: middles of the outer pixels
    y, x = places
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)


class CachedLoader(BatchLoader):
    """The batches of an image data set that lies on the device.

    Evaluation shows the very pixels and masks that `Loader` shows. Training crops and mirrors with draws of its own, a
    pure function of (seed, epoch, sample), resizes bilinearly, and takes each mask from `MASKS` that are drawn once.

    Args:
        dataset: images; in training all of one size.
        sampler, ledger, device: see `Loader`.
        num_workers: processes that decode; 0 = none.

    Raises:
        ValueError: images of several sizes.
        TooManyBadSamples: more than DATA.MAX_BAD_FRACTION cannot be read.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        sampler: EpochSampler,
        ledger: BadSampleLedger | None = None,
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(dataset, sampler, device)
        self.dataset: ImageFolder = dataset
        self.transform = dataset.transform
        self._bad: dict[int, BadSample] = {}
        started = time.perf_counter()
        pixels, places = self._read(ledger, num_workers)
        self._pixels = pixels.to(self.device)
        self._places = places.to(self.device)
        self._labels = torch.tensor(dataset.labels)[places].to(self.device)
        self._masks, self.max_hidden = self._draw_masks()
        logger.info(
            "%d images of %d x %d pixels decoded in %.1f s and kept on %s: %.0f MB",
            len(pixels),
            *pixels.shape[1:3],
            time.perf_counter() - started,
            self.device,
            pixels.nbytes / 1e6,
        )

    def _read(self, ledger: BadSampleLedger | None, num_workers: int) -> tuple[Tensor, Tensor]:
        """(N, h, w, 3) uint8 and (N,) int64, the place that each image was taken from."""
        loader: DataLoader[Any] = DataLoader(
            _Decoded(self.dataset),
            _CHUNK,
            num_workers=num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # and not the model's, see `Loader`
            **worker_options(num_workers),
        )
        if num_workers > 0:
            gc.collect()  # what waits to be collected here must not be cleared away by a worker
        with signals_blocked():
            chunks = iter(loader)
        pixels: list[Tensor] = []
        places: list[int] = []
        for chunk in chunks:
            for picture, place, bad in chunk:
                if pixels and picture.shape != pixels[0].shape:
                    sizes = " and ".join(f"{shape[1]}x{shape[0]}" for shape in (pixels[0].shape, picture.shape))
                    raise ValueError(
                        f"{self.dataset.path(place)}: images of {sizes} pixels; DATA_LOADER.RESIDENT takes data sets "
                        "of one size: set it to False"
                    )
                pixels.append(picture.clone())  # out of the memory that is shared with the worker
                places.append(place)
                if bad and not self.dataset.replace_bad:
                    self._bad[place] = bad[0]
                if ledger is not None:
                    ledger.record(bad)
        return torch.stack(pixels), torch.tensor(places)

    @property
    def _trains(self) -> bool:
        return isinstance(self.transform, ImageTrainTransform)

    def _draw_masks(self) -> tuple[Tensor | None, int | None]:
        """Masks (P, gh, gw) bool on the device, and the most that any of them hides: in training a stock, each mask
        also mirrored along either axis and both (blocks have no preferred side); in evaluation one for each sample.
        """
        draw, seed = self.dataset.draw_hidden, self.dataset.seed
        if draw is None:
            return None, None
        if self._trains:
            stock = [draw(sample_generator(seed, 0, number, 0, MASK_STREAM)) for number in range(MASKS)]
            masks = torch.from_numpy(np.stack(stock))
            masks = torch.cat([masks, masks.flip(1), masks.flip(2), masks.flip(1, 2)])
        else:
            drawn = [draw_mask(draw, seed, 0, index, 0) for index in range(len(self.dataset))]
            masks = torch.stack([mask for mask in drawn if mask is not None])
        return masks.to(self.device), int(masks.flatten(1).sum(dim=1).max())

    def _draw(self, epoch: int) -> _Draws:
        """What training draws in an epoch."""
        assert isinstance(self.transform, ImageTrainTransform)
        number, (height, width) = len(self.dataset), self._pixels.shape[1:3]
        rng = np.random.default_rng(np.random.SeedSequence((self.dataset.seed, epoch, number, VIEW_STREAM)))
        uniform = rng.random((number, _TRIES, 4), dtype=np.float32)
        box = draw_boxes(uniform, height, width, self.transform.scale, self.transform.ratio)
        mirror = (rng.random(number) < 0.5) & self.transform.flip
        mask = None if self._masks is None else rng.integers(0, len(self._masks), number)
        return _Draws(
            torch.from_numpy(box.astype(np.float32)).to(self.device),
            torch.from_numpy(mirror).to(self.device),
            None if mask is None else torch.from_numpy(mask).to(self.device),
        )

    def _shown(self, index: Tensor, draws: _Draws | None) -> Batch:
        """The batch of some samples: index (B,) int64 on the device."""
        shift, scale = affine(self.transform.mean, self.transform.std, self.device)
        pictures = self._pixels[index].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        masks = index
        if draws is not None:
            pictures = crop_resized(pictures, draws.box[index], draws.mirror[index], self.transform.crop)
            masks = index if draws.mask is None else draws.mask[index]
        # Both as `PackedPixels` does it there: in one step they round differently.
        on_cpu = self.device.type == "cpu"
        return Batch(
            clip=pictures.mul_(scale).add_(shift) if on_cpu else torch.addcmul(shift, pictures, scale),
            label=self._labels[index],
            hidden=None if self._masks is None else self._masks[masks],
            index=self._places[index],
            max_hidden=self.max_hidden,
        )

    def __iter__(self) -> Iterator[Batch]:
        """The batches, on the loader's device; nothing is sent there but the order, once an epoch."""
        draws = self._draw(self.sampler.epoch) if self._trains else None
        rows = [[key.index for key in keys] for keys in self.sampler]
        order = torch.tensor([index for row in rows for index in row], dtype=torch.int64).to(self.device)
        for row, index in zip(rows, order.split([len(row) for row in rows]), strict=True):
            batch = self._shown(index, draws)
            unread = [place for place, sample in enumerate(row) if sample in self._bad]
            if unread:
                batch.clip[unread] = 0.0
                batch = replace(batch, bad=tuple(self._bad[row[place]] for place in unread))
            yield batch

    def some(self, indices: Sequence[int]) -> Iterator[Batch]:
        draws = self._draw(0) if self._trains else None
        for index in indices:
            replaced = int(self._places[index]) != index
            if index not in self._bad and not replaced:
                yield self._shown(torch.tensor([index], device=self.device), draws)
