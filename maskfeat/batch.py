"""The types at the interface of an objective: it takes a `Batch` and returns a `StepOutput`.

Shape legend: B samples, C channels, T frames, H x W pixels, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass


class SampleKey(NamedTuple):
    """Key of one view of one sample in one epoch. With the seed, it determines all random draws of the view."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used
    view: int = 0


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read.

    Attributes:
        index: in its data set.
        path: of the file.
        cause: why, in words.
    """

    index: int
    path: str
    cause: str


def most_hidden(masks: Sequence[np.ndarray | Tensor]) -> int | None:
    """Return `Batch.max_hidden` of bool masks of any shape; None without masks."""
    return max(int(mask.sum()) for mask in masks) if masks else None


@dataclass
class Batch:
    """One batch, on one device.

    Attributes:
        clip: (B, C, H, W) or (B, C, T, H, W) float32, normalised.
        label: (B,) int64 class indices; or (B, K) float soft targets, used as given and not mixed again; or None.
        hidden: (B, *mask_grid) bool, True = removed from the model's view; or None. Of frequencies (MFM): (B, H, W) of
            the shifted spectrum, or (B, 1, 1), see `objectives.mfm`.
        index: (B,) int64, the index of each sample in its data set.
        bad: samples that could not be read while the batch was loaded. In training they were replaced by others; in
            testing their rows hold zeros and count as wrong.
        max_hidden: the largest number of True in any sample's mask, known without synchronising with the device; None
            without masks. Micro-batches keep the value of the whole batch.
    """

    clip: Tensor
    label: Tensor | None = None
    hidden: Tensor | None = None
    index: Tensor | None = None
    bad: tuple[BadSample, ...] = ()
    max_hidden: int | None = None

    def __len__(self) -> int:
        return self.clip.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with `change` applied to every tensor."""

        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return replace(
            self,
            clip=change(self.clip),
            label=changed(self.label),
            hidden=changed(self.hidden),
            index=changed(self.index),
        )

    def split(self, size: int) -> list["Batch"]:
        """Split into micro-batches of at most `size` samples, in order. `size` 0 returns the batch itself."""
        if size <= 0 or size >= len(self):
            return [self]

        def rows(start: int) -> "Batch":
            return replace(self._map(lambda tensor: tensor[start : start + size]), bad=())

        return [rows(start) for start in range(0, len(self), size)]


@dataclass
class StepOutput:
    """The result of an objective for one batch.

    Attributes:
        loss: scalar float32 with gradient, the mean over the objective's own terms (hidden tokens, samples, ...).
        metrics: detached scalars on the device of the batch, each a mean over the same terms.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]


# DistributedDataParallel looks for tensors with gradients in the output of the module that it wraps.
register_dataclass(StepOutput)
