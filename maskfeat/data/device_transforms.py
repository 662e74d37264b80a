"""What leaves a data worker: uint8 pixels, and what the consuming process still does to them on its device.

Resizing in float, mirroring, normalising and erasing cost more than reading once they are done in float32 in a worker,
and four bytes a value on the way to the device. So a worker sends bytes, and `PackedPixels.finish` does the rest where
the batch is used. Nothing in it waits for a CUDA device.

Shape legend: B views, C = 3 channels, T frames, H x W pixels of the finished view, h x w pixels as they were cropped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor

Colour = tuple[float, ...]


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


class Erased(NamedTuple):
    """A box that is overwritten, and the shape of what is written: (C * T, height, width), or (C * T, 1, 1)."""

    box: Box
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What is left to do to one view, in the order of the attributes.

    Attributes:
        shape: of the finished view, (C, H, W) or (C, T, H, W).
        size: (height, width) that frames are resized to, bilinearly and without antialiasing; None = as they are.
        window: what is cut out of the resized frames; None = all of them.
        mirror: whether left and right change places.
        mean, std: RGB, of pixels in [0, 1].
        erased: boxes of the normalised view that hold other values, in the order in which they were drawn.
        readable: False for a sample that could not be read: its finished view holds zeros.
    """

    shape: tuple[int, ...]
    mean: Colour = (0.0, 0.0, 0.0)
    std: Colour = (1.0, 1.0, 1.0)
    size: tuple[int, int] | None = None
    window: Box | None = None
    mirror: bool = False
    erased: tuple[Erased, ...] = ()
    readable: bool = True


@dataclass(frozen=True)
class Pixels:
    """One view on its way from a worker to its batch.

    Attributes:
        data: of any strides: (H, W, C) uint8 of an image, (T, h, w, C) uint8 or float32 of 0 to 255 of a clip.
        plan: what is left to do.
        values: float32, what is written into each of `plan.erased`.
    """

    data: Tensor
    plan: Plan
    values: tuple[Tensor, ...] = ()

    @classmethod
    def unreadable(cls, shape: Sequence[int]) -> "Pixels":
        """What stands for a sample that could not be read: a view of `shape`, (C, [T,] H, W), that ends as zeros."""
        _, *frames, height, width = shape
        return cls(torch.zeros(*frames, height, width, 3, dtype=torch.uint8), Plan(tuple(shape), readable=False))

    def slim(self) -> "Pixels":
        """The same view, already resized where that takes fewer bytes although it takes float32.

        Of frames much larger than their crop (1080p), batches of bytes would fill the memory that processes share.
        """
        if self.plan.size is None or self.data.numel() <= 4 * math.prod(self.plan.shape):
            return self
        frames = torch.cat([_resized(frame[None], self.plan) for frame in self.data])
        return replace(self, data=frames.permute(0, 2, 3, 1), plan=replace(self.plan, size=None, window=None))

    def finish(self) -> Tensor:
        """The view as an objective sees it: (C, [T,] H, W) float32, normalised, on the CPU."""
        return PackedPixels.pack([self]).finish(torch.device("cpu"))[0]


class _Recorder:
    """Takes the place of a tensor (C * T, H, W) float32 under timm's RandomErasing and notes what is written."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, shape: Sequence[int]) -> None:
        channels, *frames, height, width = shape
        self.shape = torch.Size((channels * math.prod(frames), height, width))
        self.erased: list[Erased] = []
        self.values: list[Tensor] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: Any, values: Tensor) -> None:
        channels, rows, columns = place
        assert channels == slice(None), "all channels are erased together"
        box = Box(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        self.erased.append(Erased(box, tuple(values.shape)))
        self.values.append(values)


def erase(pixels: Pixels, erasing: RandomErasing) -> Pixels:
    """Draws what timm's RandomErasing erases of the finished view, in every frame the same box."""
    recorder = _Recorder(pixels.plan.shape)
    erasing(recorder)
    if not recorder.erased:
        return pixels
    return replace(pixels, plan=replace(pixels.plan, erased=tuple(recorder.erased)), values=tuple(recorder.values))


class Part(NamedTuple):
    """One view in a packed batch: its shape and dtype, and how many bytes it takes, what is left between included."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int


@dataclass(frozen=True)
class PackedPixels:
    """The pixels of a batch: as few tensors as can be, to share between processes and to page-lock.

    Attributes:
        data: (n,) uint8, the bytes of all views one after the other.
        values: (m,) float32, what is written into all erased boxes, or None where nothing is erased.
        mirrored: (k,) int64, the rows of an image batch that are mirrored, or None.
        parts: where each view lies in `data`.
        plans: of each view.
    """

    data: Tensor
    values: Tensor | None
    mirrored: Tensor | None
    parts: tuple[Part, ...]
    plans: tuple[Plan, ...]

    @classmethod
    def pack(cls, views: Sequence[Pixels]) -> "PackedPixels":
        """The views of a batch, in order; they end in the same shape, however large they still are."""
        plans = tuple(view.plan for view in views)
        # A float must not begin between two multiples of its size.
        unit = max(view.data.itemsize for view in views)
        parts = tuple(
            Part(tuple(view.data.shape), view.data.dtype, -(-view.data.nbytes // unit) * unit) for view in views
        )
        assert len({plan.shape for plan in plans}) == 1, "the views of a batch end in one shape"
        data = torch.empty(sum(part.size for part in parts), dtype=torch.uint8)
        for place, view in zip(_unpacked(data, parts), views, strict=True):
            place.copy_(view.data)
        values = [value.flatten() for view in views for value in view.values]
        rows = [row for row, plan in enumerate(plans) if plan.mirror and len(plan.shape) == 3]
        return cls(
            data,
            torch.cat(values) if values else None,
            torch.tensor(rows, dtype=torch.int64) if rows else None,
            parts,
            plans,
        )

    def pin_memory(self) -> "PackedPixels":
        """The same in page-locked memory."""
        pinned = [None if part is None else part.pin_memory() for part in (self.values, self.mirrored)]
        return replace(self, data=self.data.pin_memory(), values=pinned[0], mirrored=pinned[1])

    def finish(self, device: torch.device) -> Tensor:
        """Moves the bytes to `device` and does what is left to do there.

        Returns:
            (B, C, H, W) or (B, C, T, H, W) float32 on `device`, normalised, contiguous.
        """
        clip = torch.empty(len(self.plans), *self.plans[0].shape, device=device)
        data = self.data.to(device, non_blocking=True)
        if clip.ndim == 4:
            self._finish_images(data.view(len(clip), *self.parts[0].shape).permute(0, 3, 1, 2), clip)
        else:
            for row, frames in enumerate(_unpacked(data, self.parts)):
                _finish_clip(frames, self.plans[row], clip[row])
        self._erase(clip)
        for row, plan in enumerate(self.plans):
            if not plan.readable:
                clip[row].zero_()
        return clip

    def _finish_images(self, data: Tensor, clip: Tensor) -> None:
        """(B, C, H, W) uint8 with the channels last in memory into float32 of the same shape."""
        readable = next((plan for plan in self.plans if plan.readable), self.plans[0])
        shift, scale = affine(readable.mean, readable.std, clip.device)
        if not _at_once(clip.device):
            for row, plan in enumerate(self.plans):
                clip[row].copy_(data[row].flip(-1) if plan.mirror else data[row]).mul_(scale).add_(shift)
            return
        pictures = data.to(torch.float32, memory_format=torch.contiguous_format)
        if self.mirrored is not None:
            rows = self.mirrored.to(clip.device, non_blocking=True)
            pictures.index_copy_(0, rows, pictures.index_select(0, rows).flip(-1))
        torch.addcmul(shift, pictures, scale, out=clip)

    def _erase(self, clip: Tensor) -> None:
        if self.values is None:
            return
        values = self.values.to(clip.device, non_blocking=True)
        places = [(row, erased) for row, plan in enumerate(self.plans) for erased in plan.erased]
        parts = values.split([math.prod(erased.shape) for _, erased in places])
        for (row, (box, shape)), part in zip(places, parts, strict=True):
            view = clip[row].view(-1, *clip.shape[-2:])  # (C * T, H, W), as timm saw it
            view[:, box.top : box.top + box.height, box.left : box.left + box.width] = part.view(shape)


def _at_once(device: torch.device) -> bool:
    """Whether pictures are finished together: a GPU wants few launches, a CPU one picture at a time in its cache.

    Frame by frame, the channels last in memory, a CPU resizes in a fraction of the time and memory of the whole clip.
    """
    return device.type != "cpu"


def _unpacked(data: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """The views that lie in (n,) uint8, without a copy."""
    places = data.split([part.size for part in parts])
    return [
        place[: math.prod(part.shape) * part.dtype.itemsize].view(part.dtype).view(part.shape)
        for place, part in zip(places, parts, strict=True)
    ]


def _resized(frames: Tensor, plan: Plan) -> Tensor:
    """(T, h, w, C) into (T, C, H, W) float32: resized and cut."""
    pictures = frames.permute(0, 3, 1, 2).to(torch.float32)
    if plan.size is not None:
        pictures = F.interpolate(pictures, size=plan.size, mode="bilinear", align_corners=False)
    if plan.window is not None:
        top, left, height, width = plan.window
        pictures = pictures[..., top : top + height, left : left + width]
    return pictures


def _finish_clip(frames: Tensor, plan: Plan, clip: Tensor) -> None:
    """(T, h, w, C) uint8 or float32 into (C, T, H, W) float32: resized, cut, mirrored and normalised."""
    shift, scale = affine(plan.mean, plan.std, clip.device)
    out = clip.transpose(0, 1)
    step = len(frames) if _at_once(clip.device) else 1
    for first in range(0, len(frames), step):
        pictures = _resized(frames[first : first + step], plan)
        if plan.mirror:
            pictures = pictures.flip(-1)
        torch.addcmul(shift, pictures, scale, out=out[first : first + step])


@lru_cache(maxsize=64)
def affine(mean: Colour, std: Colour, device: torch.device) -> tuple[Tensor, Tensor]:
    """(C, 1, 1) float32 each: x * scale + shift = (x / 255 - mean) / std, within 5e-7 for x of 0 to 255.

    Kept for each device, and filled there: what is copied from the host has to be waited for.
    """
    shift = torch.stack([torch.full((1, 1), -m / s, device=device) for m, s in zip(mean, std, strict=True)])
    scale = torch.stack([torch.full((1, 1), 1 / (255 * s), device=device) for s in std])
    return shift, scale
