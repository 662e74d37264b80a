"""Batch samplers: the keys of the samples of each batch."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from maskfeat.batch import SampleKey
from maskfeat.errors import UserError


def shares(mixture: Sequence[tuple[int, float]], number: int) -> list[int]:
    """Return how many of `number` samples each source gives: weights as shares, by largest remainders.

    Args:
        mixture: (samples, weight) of each source.
    """
    total = sum(weight for _, weight in mixture)
    exact = np.array([weight / total * number for _, weight in mixture])
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: number - whole.sum()]] += 1
    return [int(samples) for samples in whole]


class EpochSampler(Sampler[list[SampleKey]]):
    """The batches of an epoch, as lists of keys, for one of several ranks.

    The order depends on (seed, epoch) only. An item is one view of one sample. Global batch g consists of
    batch_size x world_size items from item g x batch_size x world_size on, of which rank r takes the r-th contiguous
    share, so that W ranks with batches of B see the same items as one rank with batches of W x B.

    Without `drop_last` every item occurs exactly once over all ranks. The last global batch may then be short, so that
    later ranks have a smaller last batch or one batch less. Nothing is padded: ranks may take different numbers of
    steps, which code that reduces results over ranks has to allow for.

    Args:
        num_samples: number of samples in the data set.
        batch_size: items per batch on each rank.
        rank, world_size: index of this process and number of processes.
        shuffle: use a new order every epoch; otherwise the order of the data set.
        drop_last: drop the last global batch if it is not full (training).
        seed: of the order.
        views: number of items of each sample, with views 0, 1, ... next to each other (testing).
        repeats: repeated augmentation (Hoffer et al., CVPR 2020): number of differently augmented copies of a sample,
            next to each other. An epoch keeps its length and uses the first 1 / repeats of the shuffled samples.
        mixture: (samples, weight) of several sources that lie one after another in the data set, see `_mixed`; () =
            every sample occurs once.

    Raises:
        UserError: with `drop_last`, if the data set does not fill a single global batch.
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
        mixture: Sequence[tuple[int, float]] = (),
    ) -> None:
        assert batch_size >= 1 and 0 <= rank < world_size and views >= 1 and repeats >= 1
        assert views == 1 or repeats == 1, "all views are shown, or some are repeated"
        self.num_items = num_samples * views
        self.num_samples, self.copies = num_samples, views * repeats
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.mixture = mixture
        assert not mixture or (shuffle and sum(samples for samples, _ in mixture) == num_samples)
        self.epoch, self.start = 0, 0
        if drop_last and self.num_items < batch_size * world_size:
            raise UserError(
                f"{num_samples} training samples do not fill one batch of {batch_size * world_size} "
                f"({world_size} processes x {batch_size}): lower TRAIN.BATCH_SIZE"
            )

    def __len__(self) -> int:
        """Number of batches of a whole epoch on this rank, wherever the iteration starts."""
        full, rest = divmod(self.num_items, self.batch_size * self.world_size)
        return full + (not self.drop_last and rest > self.rank * self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration epoch `epoch`, from its first batch on."""
        self.epoch, self.start = epoch, 0

    def set_start(self, step: int) -> None:
        """Skip the first `step` batches of this epoch in the next iterations. Call it after `set_epoch`."""
        assert step >= 0
        self.start = step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # Computed here and not when the first batch is requested, because the epoch may have changed by then.
        epoch, start = self.epoch, self.start
        order, rounds = np.arange(self.num_samples), np.broadcast_to(epoch, self.num_samples)
        if self.mixture:
            order, rounds = self._mixed(epoch)
        elif self.shuffle:
            order = _permutation(self.num_samples, self.seed, epoch)
        return (self._batch(order, rounds, step) for step in range(start, len(self)))

    def _mixed(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of an epoch of a mixture, in order, and the epoch of the key of each.

        A source is gone through in rounds: every sample once, in a new order each time. An epoch takes what follows on
        from the last one, as many samples as the source's share of it, and shuffles those of all sources. Both orders
        are functions of seed and epoch alone. A sample may occur several times in an epoch, in different rounds: the
        round is the epoch of its key, so that its augmentation differs.
        """
        number = -(-self.num_items // self.copies)
        order, rounds, first = [], [], 0
        for source, ((samples, _), drawn) in enumerate(zip(self.mixture, shares(self.mixture, number), strict=True)):
            position = np.arange(epoch * drawn, (epoch + 1) * drawn)
            of_source = position // samples
            for one in np.unique(of_source):
                drawn_then = _permutation(samples, self.seed, int(one), source + 1)
                order.append(first + drawn_then[position[of_source == one] % samples])
            rounds.append(of_source)
            first += samples
        shuffled = _permutation(number, self.seed, epoch)
        return np.concatenate(order)[shuffled], np.concatenate(rounds)[shuffled]

    def _batch(self, order: np.ndarray, epochs: np.ndarray, step: int) -> list[SampleKey]:
        first = (step * self.world_size + self.rank) * self.batch_size
        last = min(first + self.batch_size, self.num_items)
        places = ((item // self.copies, item % self.copies) for item in range(first, last))
        return [SampleKey(int(epochs[place]), int(order[place]), copy) for place, copy in places]


def _permutation(number: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence(seed)).permutation(number)
