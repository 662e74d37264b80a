"""What flows through the program: a `Batch` goes in, a `StepOutput` comes out.

Shape legend: B samples, C channels, T frames, H x W pixels, K classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass


class SampleKey(NamedTuple):
    """Names one draw of one sample; every random draw in the data is a pure function of (seed, these)."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    view: int = 0


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read: its place in the data set, its path, and the cause in words."""

    index: int
    path: str
    cause: str


@dataclass
class Batch:
    """One batch, on one device.

    Attributes:
        clip: (B, C, H, W) or (B, C, T, H, W) float32, normalised.
        label: (B,) int64 class indices; or (B, K) float soft targets, taken as they are and never mixed again; or None.
        hidden: (B, *mask_grid) bool, True = removed from the model's view; or None. Of frequencies (MFM): (B, H, W) of
            the shifted spectrum, or (B, 1, 1), see `objectives.mfm`.
        index: (B,) int64, the place of each sample in its data set.
        bad: samples that could not be read while this batch was made (already replaced in training; in testing
            their rows hold zeros and count as wrong).
        max_hidden: the largest number of True in any sample's mask, known without asking the device; None without
            masks. Of micro-batches, still that of the whole batch.
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
        """The same batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed."""

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
        """Micro-batches of at most `size` samples, in order. `size` 0 keeps the batch whole."""
        if size <= 0 or size >= len(self):
            return [self]

        def rows(start: int) -> "Batch":
            return replace(self._map(lambda tensor: tensor[start : start + size]), bad=())

        return [rows(start) for start in range(0, len(self), size)]


@dataclass
class StepOutput:
    """What an objective returns for a batch.

    Attributes:
        loss: scalar float32 with gradient, the mean over the objective's own terms (hidden tokens, samples, ...).
        metrics: detached scalars on the device of the batch, each a mean over the same terms.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]


# DistributedDataParallel looks for tensors with gradients in what it wraps returns.
register_dataclass(StepOutput)
