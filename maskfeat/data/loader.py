"""Which samples make which batch, and the worker processes that make them."""

import gc
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from maskfeat.batch import Batch, SampleKey
from maskfeat.data.bad_samples import BadSampleLedger
from maskfeat.data.collate import Sample, collate
from maskfeat.distributed.processes import leave_signals_to_parent, signals_held_back


class LabelledSamples(Protocol):
    """A data set: a SampleKey into the views of one sample."""

    @property
    def labels(self) -> list[int]: ...

    def __getitem__(self, key: Any, /) -> list[Sample]: ...


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


class Batches:
    """The batches of a data set for one process.

    Every epoch: `set_epoch(e)`, on resuming in its middle `set_start(step)`, then iterate.

    Args:
        dataset: the samples.
        sampler: the batches of keys.
        device: where batches are handed out; None = the CPU.
    """

    def __init__(self, dataset: LabelledSamples, sampler: EpochSampler, device: torch.device | None = None) -> None:
        self.dataset, self.sampler = dataset, sampler
        self.device = device or torch.device("cpu")

    @property
    def labels(self) -> list[int]:
        """The class of every sample of the data set."""
        return self.dataset.labels

    @property
    def batch_size(self) -> int:
        """Items a batch, on this rank."""
        return self.sampler.batch_size

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is epoch `epoch`, from its first batch on."""
        self.sampler.set_epoch(epoch)

    def set_start(self, step: int) -> None:
        """The next iterations of this epoch leave out the first `step` batches. To be called after
        `set_epoch`."""
        self.sampler.set_start(step)

    def __iter__(self) -> Iterator[Batch]:
        """The batches, finished on the device."""
        raise AssertionError("a loader implements __iter__")

    def some(self, indices: Sequence[int]) -> Iterator[Batch]:
        """One batch for each of these samples; those that cannot be read are left out."""
        raise AssertionError("a loader implements some")


def worker_options(num_workers: int) -> dict[str, Any]:
    """What a DataLoader is told of its worker processes, if it has any."""
    if num_workers == 0:
        return {}
    options: dict[str, Any] = {"worker_init_fn": _start_worker}
    if sys.platform == "linux":
        # Said outright: a process that was spawned would spawn in its turn, and every worker start Python anew.
        options["multiprocessing_context"] = "fork"
    return options


class Loader(Batches):
    """Batches of a data set, made by worker processes; samples that cannot be read are entered in a ledger.

    Keys carry the epoch, so the workers stay alive from one epoch to the next.

    Args:
        dataset: maps a SampleKey to a list of samples.
        sampler: the batches of keys.
        ledger: where bad samples are named and counted; None ignores them.
        num_workers: processes; 0 makes the data in this one.
        pin_memory: page-locks batches for the way to `device`; without effect on the CPU.
        prefetch_factor: batches that each worker makes ahead.
        device: where batches are finished (resized, mirrored, normalised, erased) and handed out; None = the CPU.
    """

    def __init__(
        self,
        dataset: LabelledSamples,
        sampler: EpochSampler,
        ledger: BadSampleLedger | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(dataset, sampler, device)
        self.ledger = ledger
        self._forks = num_workers > 0
        workers = worker_options(num_workers)
        if num_workers > 0:
            workers |= {"persistent_workers": True, "prefetch_factor": prefetch_factor}
        self._loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]  # a map by SampleKey rather than by int
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory and self.device.type == "cuda",
            # The DataLoader draws a seed for its workers every epoch; from here, and not from the model's
            # generator.
            generator=torch.Generator(),
            **workers,
        )

    def __iter__(self) -> Iterator[Batch]:
        """The batches, finished on the loader's device.

        Raises:
            TooManyBadSamples: more than DATA.MAX_BAD_FRACTION of the data set cannot be read.
        """
        if self._forks:
            # What waits to be collected here (a decoder with threads, a file) must not be cleared away by a worker.
            gc.collect()
            self._forks = False
        with signals_held_back():
            batches = iter(self._loader)
        for raw in batches:
            if self.ledger is not None:
                self.ledger.record(raw.bad)
            yield raw.finish(self.device)

    def some(self, indices: Sequence[int]) -> Iterator[Batch]:
        for index in indices:
            raw = collate([self.dataset[SampleKey(0, index)]])
            if not raw.bad:
                yield raw.finish(self.device)


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
    leave_signals_to_parent()
