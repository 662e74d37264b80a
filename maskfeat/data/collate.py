"""One sample on its way from a data set to a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from maskfeat.batch import BadSample, Batch
from maskfeat.data.bad_samples import UnreadableSample, naming_sample
from maskfeat.data.device_transforms import PackedPixels, Pixels
from maskfeat.data.rng import MASK_STREAM, sample_generator

MAX_REPLACEMENTS = 100
"""How many samples are tried, the one that was asked for included."""

T = TypeVar("T")

DrawHidden = Callable[[np.random.Generator], np.ndarray]
"""Draws a mask: takes a generator, returns a bool array of the mask grid, True = removed from the model's
view."""


@dataclass
class Sample:
    """One view of one sample.

    Attributes:
        clip: its pixels and what is left to do to them; ends as zeros where it could not be read (testing only).
        label: the class.
        hidden: bool of the mask grid, True = removed from the model's view; or None.
        index: the sample's place in its data set. Where another one was shown in its stead, that one's place.
        bad: every sample that could not be read on the way here.
    """

    clip: Pixels
    label: int
    hidden: Tensor | None
    index: int
    bad: tuple[BadSample, ...] = ()


def draw_mask(draw: DrawHidden | None, seed: int, epoch: int, index: int, view: int) -> Tensor | None:
    """The mask of one view, as a bool tensor; None where there is nothing to draw."""
    if draw is None:
        return None
    hidden = np.asarray(draw(sample_generator(seed, epoch, index, view, MASK_STREAM)))
    return torch.from_numpy(np.ascontiguousarray(hidden, dtype=np.bool_))


@dataclass(frozen=True)
class RawBatch:
    """A batch as a worker sends it: on the CPU, its pixels not finished. For the other attributes see `Batch`."""

    pixels: PackedPixels
    label: Tensor
    hidden: Tensor | None
    index: Tensor
    bad: tuple[BadSample, ...]
    max_hidden: int | None

    def pin_memory(self) -> "RawBatch":
        """Called by the DataLoader's pinning thread: the same batch in page-locked memory."""
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            label=self.label.pin_memory(),
            hidden=None if self.hidden is None else self.hidden.pin_memory(),
            index=self.index.pin_memory(),
        )

    def finish(self, device: torch.device) -> Batch:
        """The batch on `device`, its clip made there. Waits for nothing where its memory is page-locked."""
        return Batch(
            clip=self.pixels.finish(device),
            label=self.label.to(device, non_blocking=True),
            hidden=None if self.hidden is None else self.hidden.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            bad=self.bad,
            max_hidden=self.max_hidden,
        )


def collate(samples: Sequence[Sequence[Sample]]) -> RawBatch:
    """All views of all samples as one batch, in order: the views of a sample stand beside one another."""
    flat = [view for views in samples for view in views]
    assert flat, "a batch needs at least one sample"
    masks = [view.hidden for view in flat if view.hidden is not None]
    assert len(masks) in (0, len(flat)), "either all samples of a batch have a mask or none has"
    hidden = torch.stack(masks) if masks else None
    bad = {sample.index: sample for view in flat for sample in view.bad}
    return RawBatch(
        pixels=PackedPixels.pack([view.clip for view in flat]),
        label=torch.tensor([view.label for view in flat], dtype=torch.int64),
        hidden=hidden,
        index=torch.tensor([view.index for view in flat], dtype=torch.int64),
        bad=tuple(bad.values()),
        max_hidden=None if hidden is None else int(hidden.flatten(1).sum(dim=1).max()),
    )


class Readable(Protocol):
    """What `first_readable` needs to know of a data set."""

    replace_bad: bool

    def __len__(self) -> int: ...

    def path(self, index: int) -> str: ...


def first_readable(
    dataset: Readable, read: Callable[[int], T], index: int
) -> tuple[T | None, int, tuple[BadSample, ...]]:
    """Reads sample `index` or, where it cannot be read and the data set replaces such, the next one that
    can be.

    Args:
        dataset: its length, paths and whether it replaces.
        read: reads the sample of that place, or raises UnreadableSample.
        index: the sample that is asked for.

    Returns:
        What was read (None where it cannot be and is not replaced), its place, and the samples that could
        not be read.

    Raises:
        UnreadableSample: none of MAX_REPLACEMENTS neighbours can be read either.
    """
    bad: list[BadSample] = []
    size = len(dataset)
    for step in range(min(MAX_REPLACEMENTS, size) if dataset.replace_bad else 1):
        place = (index + step) % size
        try:
            with naming_sample(dataset.path(place)):
                return read(place), place, tuple(bad)
        except UnreadableSample as error:
            bad.append(BadSample(index=place, path=dataset.path(place), cause=error.cause))
    if dataset.replace_bad:
        raise UnreadableSample(
            dataset.path(index), f"{bad[0].cause}; nor can any of the {len(bad) - 1} samples after it be read"
        )
    return None, index, tuple(bad)
