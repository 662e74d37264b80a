"""Data loaders: worker processes, collation and the copy to the device."""

import gc
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from maskfeat.batch import Batch, SampleKey
from maskfeat.data.bad_samples import BadSampleLedger
from maskfeat.data.collate import Sample, collate
from maskfeat.data.samplers import EpochSampler
from maskfeat.distributed.processes import leave_signals_to_parent, signals_blocked


class LabelledSamples(Protocol):
    """A data set: a SampleKey into the views of one sample.

    Attributes:
        views: how many views of each sample are shown in turn, 1 but in testing.
        labels: the class of every sample.
    """

    @property
    def views(self) -> int: ...

    @property
    def labels(self) -> list[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> list[Sample]: ...


class BatchLoader:
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


class Loader(BatchLoader):
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
        with signals_blocked():
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
