"""What data sets share whose samples are files, or members of shards, that are read by themselves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from maskfeat.batch import BadSample, SampleKey
from maskfeat.data.datasets.base import Split
from maskfeat.data.datasets.label_sets import LabelSet, target_of
from maskfeat.data.rng import draw_mask
from maskfeat.data.sample import Sample
from maskfeat.masking import MaskSampler


class FileSamples(Dataset[list[Sample]]):
    """Labelled files of which views are made. A subclass reads them in `__getitem__`, which takes a SampleKey.

    Args:
        samples: [(path, class number)], or [(path, class numbers)]; not copied.
        seed: of all random draws.
        draw_hidden: draws a mask for every view; None = no masks.
        replace_bad: True replaces a sample that cannot be read by the next readable one (training); False replaces it
            by zeros.
        num_views: augmented views per key in training (repeated augmentation).
        num_classes: of multi-hot targets, where samples have several class numbers.

    Attributes:
        views: of each sample, that keys tell apart.
        classes: their names by their numbers; None = not known.
        place, left_out: where the samples are and what else is there, in words, for the log.
        mixture: (samples, weight) of each of DATA.SOURCES, in the order of the samples; () = there are none.
    """

    views = 1
    classes: list[str] | None = None
    place = ""
    left_out = ""
    mixture: Sequence[tuple[int, float]] = ()

    def __init__(
        self,
        samples: Sequence[tuple[str, int | LabelSet]],
        seed: int,
        draw_hidden: MaskSampler | None,
        replace_bad: bool,
        num_views: int,
        num_classes: int,
    ) -> None:
        self.samples: Sequence[tuple[str, Any]] = samples
        self.labels = [label for _, label in self.samples]
        self.seed = seed
        self.draw_hidden = draw_hidden
        self.replace_bad = replace_bad
        self.num_views, self.num_classes = num_views, num_classes

    def __len__(self) -> int:
        return len(self.samples)

    def path(self, index: int) -> str:
        """Return the file of a sample."""
        return self.samples[index][0]

    def describe(self, split: Split) -> None:
        """Set the names of classes, the words for the log and the mixture to those of the samples' split."""
        self.classes, self.place, self.left_out = split.classes, split.place, split.left_out
        self.mixture = split.mixture

    def labelled(self, sample: Sample, key: SampleKey, view: int, index: int, bad: tuple[BadSample, ...]) -> Sample:
        """Return a view with what it needs beside its pixels.

        Args:
            sample: the view; of it only the pixels count.
            key, view: what was asked for, which decides the mask.
            index: of the sample that was read.
            bad: the samples before it that could not be read.
        """
        hidden = draw_mask(self.draw_hidden, self.seed, key.epoch, key.index, view)
        label = target_of(self.labels[index], self.num_classes)
        return replace(sample, label=label, hidden=hidden, index=index, bad=bad)
