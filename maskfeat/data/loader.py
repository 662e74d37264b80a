"""Data loaders: worker processes, collation, copying to the device and the deferred transforms."""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from maskfeat.batch import Batch, SampleKey
from maskfeat.data.bad_samples import BadSampleLog
from maskfeat.data.collate import collate
from maskfeat.data.datasets.classes import class_names
from maskfeat.data.sample import Sample
from maskfeat.data.samplers import EpochSampler
from maskfeat.distributed.processes import leave_signals_to_parent, signals_blocked
from maskfeat.errors import UserError

T = TypeVar("T")


class LabelledSamples(Protocol):
    """A data set: maps a SampleKey to the views of one sample.

    Attributes:
        views: views of each sample that are shown in turn; 1 except in testing.
        labels: the class of every sample; a tuple of classes with DATA.MULTI_LABEL.
        path: the file of a sample, for messages.
    """

    @property
    def views(self) -> int: ...

    labels: list[Any]

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> list[Sample]: ...

    def path(self, index: int) -> str: ...


class BatchLoader:
    """Base class of loaders: iterates over the batches of a data set for one process.

    In every epoch call `set_epoch(e)`, when resuming in the middle of an epoch also `set_start(step)`, then iterate.

    Args:
        dataset: the samples.
        sampler: yields the keys of each batch.
        device: of the batches; None = the CPU.
    """

    def __init__(self, dataset: LabelledSamples, sampler: EpochSampler, device: torch.device | None = None) -> None:
        self.dataset, self.sampler = dataset, sampler
        self.device = device or torch.device("cpu")

    @property
    def labels(self) -> list[Any]:
        """Class index of every sample of the data set; a tuple of indices with DATA.MULTI_LABEL."""
        return self.dataset.labels

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes by their numbers; None if the samples carry numbers alone."""
        return class_names(self.dataset)

    @property
    def batch_size(self) -> int:
        """Number of items per batch on this rank."""
        return self.sampler.batch_size

    def __len__(self) -> int:
        """Number of batches of a whole epoch on this rank."""
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration epoch `epoch`, from its first batch on."""
        self.sampler.set_epoch(epoch)

    def set_start(self, step: int) -> None:
        """Skip the first `step` batches of this epoch in the next iterations. Call it after `set_epoch`."""
        self.sampler.set_start(step)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of the epoch, on the loader's device."""
        raise AssertionError("a loader implements __iter__")

    def iter_samples(self, indices: Sequence[int]) -> Iterator[Batch]:
        """Yield one batch per sample; samples that cannot be read are skipped."""
        raise AssertionError("a loader implements iter_samples")


class ErrorsAsItems(Dataset[Any]):
    """A data set whose items are those of another one; a `UserError` of an item comes in its place.

    What a worker raises reaches the main process as the text of a traceback in an error of PyTorch's making. What it
    returns arrives as it is.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


class CollateOrError(Generic[T]):
    """Collates items of `ErrorsAsItems`, or returns the first error among them."""

    def __init__(self, collate: Callable[[Sequence[Any]], T]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> T | UserError:
        return next((item for item in items if isinstance(item, UserError)), None) or self.collate(items)


def raising(batches: Iterable[T | UserError]) -> Iterator[T]:
    """Yield the batches that `CollateOrError` returned, and raise the first error among them."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def worker_options(num_workers: int) -> dict[str, Any]:
    """Return the arguments of a DataLoader that concern its worker processes, if it has any."""
    if num_workers == 0:
        return {}
    options: dict[str, Any] = {"worker_init_fn": _start_worker}
    if sys.platform == "linux":
        # Explicit, because in a spawned process the default is to spawn, and every worker would start a new Python.
        options["multiprocessing_context"] = "fork"
    return options


class Loader(BatchLoader):
    """Batches of a data set, loaded by worker processes.

    Keys contain the epoch, so that the workers can be kept from one epoch to the next.

    Args:
        dataset: maps a SampleKey to the views of a sample.
        sampler: yields the keys of each batch.
        bad_samples: logs and counts samples that cannot be read; None = ignore them.
        num_workers: number of worker processes; 0 = load in this process.
        pin_memory: copy batches to page-locked memory before they go to `device`; no effect on the CPU.
        prefetch_factor: number of batches that each worker loads in advance.
        device: of the batches, where the deferred transforms are applied; None = the CPU.
    """

    def __init__(
        self,
        dataset: LabelledSamples,
        sampler: EpochSampler,
        bad_samples: BadSampleLog | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(dataset, sampler, device)
        self.bad_samples = bad_samples
        self._forks = num_workers > 0
        workers = worker_options(num_workers)
        if num_workers > 0:
            workers |= {"persistent_workers": True, "prefetch_factor": prefetch_factor}
        self._loader: DataLoader[Any] = DataLoader(
            ErrorsAsItems(dataset),  # its keys are SampleKeys, not integers
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=CollateOrError(collate),
            pin_memory=pin_memory and self.device.type == "cuda",
            # The DataLoader draws a seed for its workers every epoch, which must not advance the global generator.
            generator=torch.Generator(),
            **workers,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of the epoch, on the loader's device.

        Raises:
            TooManyBadSamples: more than DATA.MAX_BAD_FRACTION of the data set cannot be read.
        """
        if self._forks:
            # Garbage of this process (a decoder with threads, a file) must not be collected in a forked worker.
            gc.collect()
            self._forks = False
        with signals_blocked():
            batches = iter(self._loader)
        for packed in raising(batches):
            if self.bad_samples is not None:
                self.bad_samples.record(packed.bad, packed.index.tolist())
            yield packed.to_batch(self.device)

    def iter_samples(self, indices: Sequence[int]) -> Iterator[Batch]:
        for index in indices:
            packed = collate([self.dataset[SampleKey(0, index)]])
            if not packed.bad:
                yield packed.to_batch(self.device)


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
    leave_signals_to_parent()
    sys.excepthook = _unless_the_parent_left


def _unless_the_parent_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an error of a thread, but not that the parent left while it took a batch over, as after Ctrl-C."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
