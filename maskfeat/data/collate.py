"""Collation: the samples of a batch packed into few tensors, to be sent from a worker to the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from maskfeat.batch import BadSample, Batch
from maskfeat.data.device_transforms import Box, DeferredTransform, transform_clip, transform_images
from maskfeat.data.sample import Sample


@dataclass(frozen=True)
class PackedBatch:
    """A batch as a worker sends it: on the CPU, with its transforms still to be applied.

    All pixels share one tensor, because each tensor that is sent costs a file descriptor of shared memory and each that
    is page-locked an allocation.

    Attributes:
        pixels: (n,) uint8, the bytes of all views, one after another.
        shapes, dtypes: of each view in `pixels`.
        transforms: of each view, without the values to erase with, which are in `erase_values`.
        label: (B,) int64, or (B, K) float32.
        hidden: (B, *mask_grid) bool, or None.
        index: (B,) int64.
        flipped: (k,) int64, the rows of an image batch to flip, or None.
        erase_boxes: (row, box, shape of its values) for every box to erase.
        erase_values: (m,) float32, the values of all boxes, one after another, or None.
        bad, max_hidden: see `Batch`.
    """

    pixels: Tensor
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    transforms: tuple[DeferredTransform, ...]
    label: Tensor
    hidden: Tensor | None
    index: Tensor
    flipped: Tensor | None = None
    erase_boxes: tuple[tuple[int, Box, tuple[int, ...]], ...] = ()
    erase_values: Tensor | None = None
    bad: tuple[BadSample, ...] = ()
    max_hidden: int | None = None

    def pin_memory(self) -> "PackedBatch":
        """Return the batch in page-locked memory. Called by the DataLoader's pinning thread."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **pinned)

    def to_batch(self, device: torch.device) -> Batch:
        """Copy the batch to `device` and apply the deferred transforms there, without waiting for a GPU.

        Returns:
            a batch whose clip is (B, C, H, W) or (B, C, T, H, W) float32 on `device`, normalised, contiguous.
        """
        return Batch(
            clip=self._make_clip(device),
            label=self.label.to(device, non_blocking=True),
            hidden=None if self.hidden is None else self.hidden.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            bad=self.bad,
            max_hidden=self.max_hidden,
        )

    def _make_clip(self, device: torch.device) -> Tensor:
        clip = torch.empty(len(self.transforms), *self.transforms[0].shape, device=device)
        pixels = self.pixels.to(device, non_blocking=True)
        if clip.ndim == 4:
            images = pixels.view(len(clip), *self.shapes[0]).permute(0, 3, 1, 2)
            transform_images(images, self.transforms, self.flipped, clip)
        else:
            for row, frames in enumerate(_views(pixels, self.shapes, self.dtypes)):
                transform_clip(frames, self.transforms[row], clip[row])
        self._erase(clip)
        for row, transform in enumerate(self.transforms):
            if not transform.readable:
                clip[row].zero_()
        return clip

    def _erase(self, clip: Tensor) -> None:
        if self.erase_values is None:
            return
        values = self.erase_values.to(clip.device, non_blocking=True)
        parts = values.split([math.prod(shape) for _, _, shape in self.erase_boxes])
        for (row, box, shape), part in zip(self.erase_boxes, parts, strict=True):
            view = clip[row].view(-1, *clip.shape[-2:])  # (C * T, H, W), the shape that timm draws for
            view[:, box.top : box.top + box.height, box.left : box.left + box.width] = part.view(shape)


def collate(samples: Sequence[Sequence[Sample]]) -> PackedBatch:
    """Pack all views of all samples into one batch, in order: the views of a sample are adjacent.

    Args:
        samples: the views of each sample. Their transformed shapes are equal; their pixels may differ in size.
    """
    views = [view for sample in samples for view in sample]
    assert views, "a batch needs at least one sample"
    assert len({view.transform.shape for view in views}) == 1, "the views of a batch are transformed to one shape"
    masks = [view.hidden for view in views if view.hidden is not None]
    assert len(masks) in (0, len(views)), "either all samples of a batch have a mask or none has"
    hidden = torch.stack(masks) if masks else None
    shapes = tuple(tuple(view.pixels.shape) for view in views)
    dtypes = tuple(view.pixels.dtype for view in views)
    erased = [(row, box, values) for row, view in enumerate(views) for box, values in view.transform.erase]
    is_image = len(views[0].transform.shape) == 3
    flipped = [row for row, view in enumerate(views) if view.transform.flip and is_image]
    return PackedBatch(
        pixels=_pack_pixels(views, shapes, dtypes),
        shapes=shapes,
        dtypes=dtypes,
        transforms=tuple(
            replace(view.transform, erase=()) if view.transform.erase else view.transform for view in views
        ),
        label=torch.stack([torch.as_tensor(view.label) for view in views]),
        hidden=hidden,
        index=torch.tensor([view.index for view in views], dtype=torch.int64),
        flipped=torch.tensor(flipped, dtype=torch.int64) if flipped else None,
        erase_boxes=tuple((row, box, tuple(values.shape)) for row, box, values in erased),
        erase_values=torch.cat([values.flatten() for _, _, values in erased]) if erased else None,
        bad=tuple({sample.index: sample for view in views for sample in view.bad}.values()),
        max_hidden=None if hidden is None else int(hidden.flatten(1).sum(dim=1).max()),
    )


def _pack_pixels(views: Sequence[Sample], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> Tensor:
    pixels = torch.empty(sum(_sizes(shapes, dtypes)), dtype=torch.uint8)
    for target, view in zip(_views(pixels, shapes, dtypes), views, strict=True):
        target.copy_(view.pixels)
    return pixels


def _sizes(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> list[int]:
    """Bytes that each view takes in the packed tensor, including padding: float32 values must be aligned."""
    unit = max(dtype.itemsize for dtype in dtypes)
    return [-(-math.prod(shape) * dtype.itemsize // unit) * unit for shape, dtype in zip(shapes, dtypes, strict=True)]


def _views(pixels: Tensor, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The views packed in `pixels`, (n,) uint8, without a copy."""
    parts = pixels.split(_sizes(shapes, dtypes))
    return [
        part[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for part, shape, dtype in zip(parts, shapes, dtypes, strict=True)
    ]
