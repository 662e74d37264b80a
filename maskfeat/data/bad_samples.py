"""Samples that cannot be read: replacing, logging and counting them, and stopping when there are too many."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from maskfeat import file_io
from maskfeat.batch import BadSample
from maskfeat.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: the list is then written without a lock
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_LISTED = 20
"""How many bad samples the error lists before it refers to the file."""

MAX_ATTEMPTS = 100
"""How many samples are tried in place of one that cannot be read, itself included."""


class UnreadableSample(UserError):
    """A file that cannot be decoded into an image or a clip.

    Attributes:
        path: the file.
        cause: why, in words, without the path.
    """

    def __init__(self, path: str | os.PathLike[str], cause: str = "") -> None:
        # `cause` has a default because a DataLoader re-raises a worker's error from its message alone.
        self.path = os.fspath(path)
        self.cause = cause
        super().__init__(f"{self.path}: {cause}" if cause else self.path)


class TooManyBadSamples(UserError):
    """More samples cannot be read than DATA.MAX_BAD_FRACTION allows."""


def open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a sample's file, which must be a local, regular, non-empty one, see `file_io.open_regular_file`.

    Raises:
        UnreadableSample: the file is missing, empty, not regular, or cannot be opened.
    """
    try:
        return file_io.open_regular_file(path)
    except file_io.NotReadable as error:
        raise UnreadableSample(path, str(error)) from error


@contextlib.contextmanager
def error_context(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the sample's path to any error raised in the block that does not contain it yet.

    A worker's error reaches the user as text only, and "index 3 is out of bounds" does not tell which of a million
    files caused it. No error is suppressed.
    """
    try:
        yield
    except Exception as error:
        if os.fspath(path) in str(error):
            raise
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


class BadSampleLog:
    """The samples of one split that cannot be read: each is logged once, and too many of them stop the run.

    They are listed in OUTPUT_DIR/bad_samples.jsonl, one object per line with the keys split, index, path and cause.
    The list is kept across runs: samples listed by an earlier run, or by another rank, are counted and not written
    again.

    Args:
        output_dir: the folder of bad_samples.jsonl, created when needed; None keeps the list in memory only.
        num_samples: number of samples of the split.
        max_fraction: the largest share of them that may be bad, 0 to 1.
        split: "train", "val" or "test".
    """

    def __init__(
        self, output_dir: str | os.PathLike[str] | None, num_samples: int, max_fraction: float, split: str
    ) -> None:
        if not 0.0 <= max_fraction <= 1.0:
            raise UserError(f"DATA.MAX_BAD_FRACTION must lie in [0, 1], not be {max_fraction}")
        self.path = None if output_dir is None else Path(output_dir) / "bad_samples.jsonl"
        self.num_samples = num_samples
        self.max_fraction = max_fraction
        self.split = split
        self._known: dict[str, BadSample] = {}  # by path, of all runs and ranks
        self._seen: set[str] = set()  # paths recorded by this process
        self._unwritten: dict[str, BadSample] = {}  # by path: there was no room for them in the list
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                self._parse(file.read())

    @property
    def indices(self) -> frozenset[int]:
        """Indices of all bad samples of this split that are known so far."""
        return frozenset(sample.index for sample in self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    def record(self, bad: Iterable[BadSample]) -> None:
        """Record the samples of a batch that could not be read.

        Raises:
            TooManyBadSamples: more than `max_fraction` of the split is bad by now.
        """
        new = {sample.path: sample for sample in bad if sample.path not in self._seen}
        if not new and not self._unwritten:
            return
        self._seen |= new.keys()
        self._append({path: sample for path, sample in new.items() if path not in self._known})
        # Checked even if all of them are listed already: restarting must not get around the limit.
        if len(self._known) > self.max_fraction * self.num_samples:
            raise TooManyBadSamples(self._error_message())

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
            try:
                entry = json.loads(line)
                split, index = entry["split"], int(entry["index"])
                sample = BadSample(index=index, path=str(entry["path"]), cause=str(entry["cause"]))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue  # an incomplete line of a killed run: the sample is recorded again when it is read again
            if split == self.split and 0 <= index < self.num_samples:
                self._known.setdefault(sample.path, sample)

    def _error_message(self) -> str:
        samples = sorted(self._known.values(), key=lambda sample: sample.index)
        lines = [
            f"{len(samples)} of {self.num_samples} samples of {self.split} cannot be read, more than "
            f"DATA.MAX_BAD_FRACTION = {self.max_fraction:g} allows:"
        ]
        lines += [f"  {sample.index}: {sample.path}: {sample.cause}" for sample in samples[:MAX_LISTED]]
        if len(samples) > MAX_LISTED:
            lines.append(f"  ... and {len(samples) - MAX_LISTED} more")
        if self.path is not None:
            lines.append(f"All of them are listed in {self.path}.")
        lines.append("Fix or remove these files (and delete that list), or raise DATA.MAX_BAD_FRACTION.")
        return "\n".join(lines)


@contextlib.contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    """Lock the file against other ranks on this machine; without effect where locks are not supported."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # some network file systems do not support locks
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    yield  # closing the file releases the lock
