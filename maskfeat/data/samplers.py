"""Batch samplers: which samples make up which batch."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from maskfeat.batch import SampleKey


class EpochSampler(Sampler[list[SampleKey]]):
    """The batches of an epoch, as lists of keys, for one of several ranks.

    The order depends on (seed, epoch) alone. Global batch g holds the items g x batch_size x world_size and
    following, of which rank r takes its r-th contiguous share: W ranks with batches of B see what one rank
    with W x B sees.

    Without `drop_last` every item is shown exactly once over all ranks: the last global batch may be short,
    so that later ranks have a smaller last batch or one batch less. Nothing is padded, so whoever adds up
    results of several ranks must not expect them to have taken the same number of steps.

    Args:
        num_samples: in the data set.
        batch_size: items a batch, per rank.
        rank, world_size: this process and how many there are.
        shuffle: a new order every epoch; otherwise that of the data set.
        drop_last: leaves out a last global batch that is not full (training).
        seed: of the order.
        views: every sample makes this many items, with views 0, 1, ... side by side (testing).
        repeats: repeated augmentation (Hoffer et al., CVPR 2020): each sample stands this often, differently augmented,
            side by side; an epoch stays as long as it is, and shows the first 1 / repeats of the shuffled samples.

    Raises:
        ValueError: with `drop_last`, if the data set does not fill a single global batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        views: int = 1,
        repeats: int = 1,
    ) -> None:
        assert batch_size >= 1 and 0 <= rank < world_size and views >= 1 and repeats >= 1
        assert views == 1 or repeats == 1, "all views are shown, or some are repeated"
        self.num_items = num_samples * views
        self.num_samples, self.copies = num_samples, views * repeats
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.epoch, self.start = 0, 0
        if drop_last and self.num_items < batch_size * world_size:
            raise ValueError(
                f"{num_samples} training samples do not fill one batch of {batch_size * world_size} "
                f"({world_size} processes x {batch_size}): lower TRAIN.BATCH_SIZE"
            )

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, wherever it starts."""
        full, rest = divmod(self.num_items, self.batch_size * self.world_size)
        return full + (not self.drop_last and rest > self.rank * self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is epoch `epoch`, from its first batch on."""
        self.epoch, self.start = epoch, 0

    def set_start(self, step: int) -> None:
        """The next iterations of this epoch leave out the first `step` batches. To be called after
        `set_epoch`."""
        assert step >= 0
        self.start = step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # Computed now and not when the first batch is fetched: the epoch may have been set anew by then.
        epoch, start = self.epoch, self.start
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = np.random.default_rng(np.random.SeedSequence((self.seed, epoch))).permutation(self.num_samples)
        return (self._batch(order, epoch, step) for step in range(start, len(self)))

    def _batch(self, order: np.ndarray, epoch: int, step: int) -> list[SampleKey]:
        first = (step * self.world_size + self.rank) * self.batch_size
        last = min(first + self.batch_size, self.num_items)
        return [SampleKey(epoch, int(order[item // self.copies]), item % self.copies) for item in range(first, last)]
