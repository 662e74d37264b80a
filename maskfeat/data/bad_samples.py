"""Samples that cannot be read: replacing, logging and counting them, and stopping when there are too many."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np

from maskfeat import file_io
from maskfeat.batch import BadSample, SampleKey
from maskfeat.data.shards.members import Member
from maskfeat.errors import UserError, about

try:
    import fcntl
except ImportError:  # not a POSIX system: the list is then written without a lock
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_LISTED = 20
"""How many bad samples the error lists before it refers to the file."""

FEW = 3
"""How many samples may be bad in a set so small that DATA.MAX_BAD_FRACTION of it is fewer, up to half of the set."""

MAX_ATTEMPTS = 100
"""How many samples are tried in place of one that cannot be read, itself included."""


class UnreadableSample(UserError):
    """A file that cannot be decoded into an image or a clip.

    Attributes:
        path: the file.
        cause: why, in words, without the path.
    """

    def __init__(self, path: str | os.PathLike[str], cause: str = "") -> None:
        # `cause` has a default because an error of a worker is made anew from its message, then gets its attributes.
        self.path = os.fspath(path)
        self.cause = cause
        super().__init__(f"{self.path}: {cause}" if cause else self.path)


class TooManyBadSamples(UserError):
    """More samples cannot be read than DATA.MAX_BAD_FRACTION allows."""


def open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a sample's file, which must be a local, regular, non-empty one, see `file_io.open_regular_file`; or its part
    of a shard, if it is named by a `Member`.

    Raises:
        UnreadableSample: the file is missing, empty, not regular, or cannot be opened.
    """
    try:
        return path.open() if isinstance(path, Member) else file_io.open_regular_file(path)
    except file_io.NotReadable as error:
        raise UnreadableSample(path, str(error)) from error


@contextlib.contextmanager
def error_context(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the sample's path to any error raised in the block that does not contain it yet.

    "index 3 is out of bounds" does not tell which of a million files caused it. No error is suppressed, and a
    `UserError` stays one.
    """
    try:
        yield
    except Exception as error:
        if os.fspath(path) in str(error):
            raise
        if isinstance(error, UserError):
            raise about(os.fspath(path), error) from error
        raise RuntimeError(f"while loading {os.fspath(path)}: {type(error).__name__}: {error}") from error


class FileDataset(Protocol):
    """What `read_with_fallback` needs of a data set."""

    replace_bad: bool

    def __len__(self) -> int: ...

    def path(self, index: int) -> str: ...


def read_with_fallback(
    dataset: FileDataset, read: Callable[[int], T], index: int
) -> tuple[T | None, int, tuple[BadSample, ...]]:
    """Read sample `index` or, if it cannot be read and `dataset.replace_bad` is set, the next readable one.

    Args:
        dataset: gives the number of samples and their paths.
        read: reads the sample of an index, or raises UnreadableSample.
        index: the sample to read.

    Returns:
        What was read (None if it cannot be and is not replaced), its index, and the samples that could not be read.

    Raises:
        UnreadableSample: none of the MAX_ATTEMPTS samples from `index` on can be read.
    """
    bad: list[BadSample] = []
    size = len(dataset)
    for step in range(min(MAX_ATTEMPTS, size) if dataset.replace_bad else 1):
        candidate = (index + step) % size
        try:
            with error_context(dataset.path(candidate)):
                return read(candidate), candidate, tuple(bad)
        except UnreadableSample as error:
            bad.append(BadSample(index=candidate, path=dataset.path(candidate), cause=error.cause))
    if dataset.replace_bad:
        raise UnreadableSample(
            dataset.path(index), f"{bad[0].cause}; nor can any of the {len(bad) - 1} samples after it be read"
        )
    return None, index, tuple(bad)


class ListedDataset(Protocol):
    """What `BadSampleLog` needs of a data set to read a sample again: its path, and its views by a SampleKey."""

    def path(self, index: int) -> str: ...

    def __getitem__(self, key: Any, /) -> Any: ...


def allowed_bad(num_samples: int, max_fraction: float) -> int:
    """Return how many samples of a set may be bad.

    They are `max_fraction` of it, but at least FEW or half of a set that is smaller than twice FEW; none if
    `max_fraction` is 0, and never all of them.
    """
    if max_fraction == 0:
        return 0
    # A fraction such as 0.29 of 100 is 28.999... as a product.
    return min(max(int(max_fraction * num_samples + 1e-6), min(FEW, num_samples // 2)), num_samples - 1)


class BadSampleLog:
    """The samples of one split that cannot be read: each is logged once, and too many of them stop the run.

    They are listed in OUTPUT_DIR/bad_samples.jsonl, one object per line with the keys split, index, path and cause.
    The list is kept across runs: samples listed by an earlier run, or by another rank, are counted and not written
    again. Those that this process has not met are read again before they stop the run, and a sample of an earlier run
    is taken off the list once it can be read.

    Args:
        output_dir: the folder of bad_samples.jsonl, created when needed; None keeps the list in memory only.
        num_samples: number of samples of the split.
        max_fraction: the largest share of them that may be bad, 0 to 1, see `allowed_bad`.
        split: "train", "val" or "test".
        dataset: the split, to read listed samples again; None = they count as they are.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str] | None,
        num_samples: int,
        max_fraction: float,
        split: str,
        dataset: ListedDataset | None = None,
    ) -> None:
        if not 0.0 <= max_fraction <= 1.0:
            raise UserError(f"DATA.MAX_BAD_FRACTION must lie in [0, 1], not be {max_fraction}")
        self.dataset = dataset
        self.path = None if output_dir is None else Path(output_dir) / "bad_samples.jsonl"
        self.num_samples = num_samples
        self.max_fraction = max_fraction
        self.split = split
        self._known: dict[str, BadSample] = {}  # by path, of all runs and ranks
        self._seen: set[str] = set()  # paths recorded by this process
        self._back = 0  # how many were taken off the list
        self._tried = np.zeros(num_samples, dtype=bool)  # by this process
        self._unwritten: dict[str, BadSample] = {}  # by path: there was no room for them in the list
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                self._parse(file.read())
        self._earlier = {sample.index: path for path, sample in self._known.items()}  # not met by this process yet

    @property
    def indices(self) -> frozenset[int]:
        """Indices of all bad samples of this split that are known so far."""
        return frozenset(sample.index for sample in self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    def record(self, bad: Iterable[BadSample], shown: Iterable[int] = ()) -> None:
        """Record what became of the samples of a batch.

        Args:
            bad: those that could not be read.
            shown: the indices of all rows of the batch.

        Raises:
            TooManyBadSamples: more samples of the split are bad by now than may be, see `allowed_bad`.
        """
        bad, shown = list(bad), list(shown)
        self._tried[[*shown, *(sample.index for sample in bad)]] = True
        for sample in bad:
            self._earlier.pop(sample.index, None)
        if self._earlier:
            self._take_off({self._earlier.pop(index) for index in set(shown) & self._earlier.keys()})
        new = {sample.path: sample for sample in bad if sample.path not in self._seen}
        if not new and not self._unwritten:
            return
        self._seen |= new.keys()
        self._append({path: sample for path, sample in new.items() if path not in self._known})
        allowed = allowed_bad(self.num_samples, self.max_fraction)
        # Checked even if all of them are listed already: restarting must not get around the limit.
        if len(self._known) > allowed:
            self._read_again()
        if len(self._known) > allowed:
            raise TooManyBadSamples(self._error_message(allowed))

    def _read_again(self) -> None:
        """Read the listed samples that this process has not met, and take those off the list that can be read."""
        if self.dataset is None:
            return
        back = set()
        for path, sample in self._known.items():
            if path in self._seen:
                continue
            try:
                views = self.dataset[SampleKey(0, sample.index)]
            except UnreadableSample:
                continue
            if all(other.path != path for view in views for other in view.bad):
                back.add(path)
        self._earlier.clear()
        self._take_off(back)

    def _take_off(self, paths: Collection[str]) -> None:
        """Remove samples that can be read from the list."""
        if not paths:
            return
        for path in paths:
            self._known.pop(path, None)
        self._back += len(paths)
        logger.info(
            "%d samples of %s that were listed as bad can be read again so far: taken off the list",
            self._back,
            self.split,
        )
        if self.path is None or not self.path.exists():
            return
        try:
            self._rewrite(self.path, paths)
        except OSError as error:
            logger.warning("%s cannot be written (%s): it still lists them", self.path, error.strerror)

    def _rewrite(self, path: Path, without: Collection[str]) -> None:
        with path.open("r+b") as file, _locked(file):
            kept = [line for line in file.read().splitlines(keepends=True) if not self._names(line, without)]
            file.seek(0)
            file.writelines(kept)
            file.truncate()

    def _names(self, line: bytes, paths: Collection[str]) -> bool:
        sample = self._of_split(line)
        return sample is not None and sample.path in paths

    def _append(self, new: dict[str, BadSample]) -> None:
        """Write the samples that no rank has listed yet, and log a warning for each."""
        if not new and not self._unwritten:
            return
        if self.path is None:
            self._add(new)
            return
        try:
            new = self._write(new)
        except OSError as error:
            if not self._unwritten:
                logger.warning("%s cannot be written (%s): bad samples are listed later", self.path, error.strerror)
            self._unwritten.update(new)
        self._add(new)

    def _write(self, new: dict[str, BadSample]) -> dict[str, BadSample]:
        """Append samples to the list, and those that it had no room for before; those of `new` that nobody listed."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file, _locked(file):
            file.seek(0)
            text = file.read()
            self._parse(text)  # another rank may have listed the same sample in the meantime
            new = {path: sample for path, sample in new.items() if path not in self._known}
            lines = "".join(
                json.dumps({"split": self.split, "index": s.index, "path": s.path, "cause": s.cause}) + "\n"
                for s in (self._unwritten | new).values()
            )
            # A run killed while writing leaves an incomplete line: do not append to it.
            file.write((b"\n" if text and not text.endswith(b"\n") else b"") + lines.encode())
        self._unwritten = {}
        return new

    def _add(self, new: dict[str, BadSample]) -> None:
        for sample in new.values():
            self._known[sample.path] = sample
            logger.warning(
                "bad sample %d of %s, number %d: %s (%s)",
                sample.index,
                self.split,
                len(self._known),
                sample.path,
                sample.cause,
            )

    def _parse(self, text: bytes) -> None:
        for line in text.splitlines():
            sample = self._of_split(line)
            # Where files were removed from the set, an index has become that of another file.
            if sample and (self.dataset is None or self.dataset.path(sample.index) == sample.path):
                self._known.setdefault(sample.path, sample)

    def _of_split(self, line: bytes) -> BadSample | None:
        """Return the sample of a line; None if it is of another split, or cut off as a killed run leaves it."""
        try:
            entry = json.loads(line)
            split, index = entry["split"], int(entry["index"])
            sample = BadSample(index=index, path=str(entry["path"]), cause=str(entry["cause"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None  # the sample is recorded again when it is read again
        return sample if split == self.split and 0 <= index < self.num_samples else None

    def _error_message(self, allowed: int) -> str:
        samples = sorted(self._known.values(), key=lambda sample: sample.index)
        tried = int(self._tried.sum())
        lines = [
            f"{len(samples)} of {self.num_samples} samples of {self.split} cannot be read, more than "
            f"DATA.MAX_BAD_FRACTION = {self.max_fraction:g} allows ({allowed}):"
        ]
        lines += [f"  {sample.index}: {sample.path}: {sample.cause}" for sample in samples[:MAX_LISTED]]
        if len(samples) > MAX_LISTED:
            lines.append(f"  ... and {len(samples) - MAX_LISTED} more")
        rest = "every sample was tried" if tried == self.num_samples else "further ones may follow"
        where = "" if self.path is None else f"; the list is {self.path}"
        lines.append(f"These were found so far; this process has tried {tried} of {self.num_samples}: {rest}{where}.")
        lines.append(
            "Repair these files or remove them from the data set, or raise DATA.MAX_BAD_FRACTION; files that can be "
            "read again are taken off the list."
        )
        return "\n".join(lines)


@contextlib.contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    """Lock the file against other ranks on this machine; without effect where locks are not supported."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # some network file systems do not support locks
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    yield  # closing the file releases the lock
