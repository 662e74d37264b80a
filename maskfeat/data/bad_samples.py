"""Samples that cannot be read: how they are named, counted and listed, and when there are too many of
them."""

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from maskfeat import file_io as local_files
from maskfeat.batch import BadSample

try:
    import fcntl
except ImportError:  # not a POSIX system: the list is then written without a lock
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LISTED = 20
"""How many bad samples the error names before it points to the file."""


class UnreadableSample(ValueError):
    """A file that cannot be turned into a picture or a clip.

    Attributes:
        path: the file.
        cause: why, in words, without the path.
    """

    def __init__(self, path: str | os.PathLike[str], cause: str = "") -> None:
        # One argument suffices, because a DataLoader rebuilds a worker's error from its message alone.
        self.path = os.fspath(path)
        self.cause = cause
        super().__init__(f"{self.path}: {cause}" if cause else self.path)


class TooManyBadSamples(RuntimeError):
    """More samples cannot be read than DATA.MAX_BAD_FRACTION allows."""


def open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a sample's file, which must be a local, regular, non-empty one, see `local_files`.

    Raises:
        UnreadableSample: the file is missing, empty, not regular, or may not be read.
    """
    try:
        return local_files.open_regular_file(path)
    except local_files.NotReadable as error:
        raise UnreadableSample(path, str(error)) from error


class naming_sample:
    """`with naming_sample(path):` adds the sample's path to any error that does not name it yet.

    A worker's error reaches the user as text only, and "index 3 is out of bounds" helps nobody who has a
    million files. Nothing is swallowed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self.path not in str(error):
            raise RuntimeError(f"while {self.path} was made ready: {type(error).__name__}: {error}") from error


class BadSampleLedger:
    """Names each sample of one split that cannot be read once, counts it, and stops the run when there are
    too many.

    The list is OUTPUT_DIR/bad_samples.jsonl, one object a line with the keys split, index, path and cause.
    It outlives
    the process: lines of an earlier run, or of another rank, count here as well and are not written again.

    Args:
        output_dir: the folder of bad_samples.jsonl, made when needed; None keeps the list in memory alone.
        num_samples: how many samples the split has.
        max_fraction: the largest share of them that may be bad, 0 to 1.
        split: "train", "val" or "test".
    """

    def __init__(
        self, output_dir: str | os.PathLike[str] | None, num_samples: int, max_fraction: float, split: str
    ) -> None:
        if not 0.0 <= max_fraction <= 1.0:
            raise ValueError(f"DATA.MAX_BAD_FRACTION must lie in [0, 1], not be {max_fraction}")
        self.path = None if output_dir is None else Path(output_dir) / "bad_samples.jsonl"
        self.num_samples = num_samples
        self.max_fraction = max_fraction
        self.split = split
        self._known: dict[str, BadSample] = {}
        self._met: set[str] = set()  # in this run
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                self._read_lines(file.read())

    @property
    def indices(self) -> frozenset[int]:
        """The places of all bad samples of this split that are known so far."""
        return frozenset(sample.index for sample in self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    def record(self, bad: Iterable[BadSample]) -> None:
        """Takes note of the samples that a batch could not read.

        Raises:
            TooManyBadSamples: more than `max_fraction` of the split is bad by now.
        """
        met = {sample.path: sample for sample in bad if sample.path not in self._met}
        if not met:
            return
        self._met |= met.keys()
        self._append({path: sample for path, sample in met.items() if path not in self._known})
        # Checked also where the list names them already: running again must not get past the limit.
        if len(self._known) > self.max_fraction * self.num_samples:
            raise TooManyBadSamples(self._complaint())

    def _append(self, news: dict[str, BadSample]) -> None:
        if not news:
            return
        if self.path is None:
            self._name(news)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file, _locked(file):
            file.seek(0)
            text = file.read()
            self._read_lines(text)  # another rank may have met the same sample in the meantime
            news = {path: sample for path, sample in news.items() if path not in self._known}
            lines = "".join(
                json.dumps({"split": self.split, "index": s.index, "path": s.path, "cause": s.cause}) + "\n"
                for s in news.values()
            )
            # A run that was killed while it wrote leaves half a line: the next one must not be glued to it.
            file.write((b"\n" if text and not text.endswith(b"\n") else b"") + lines.encode())
        self._name(news)

    def _name(self, news: dict[str, BadSample]) -> None:
        for sample in news.values():
            self._known[sample.path] = sample
            logger.warning(
                "bad sample %d of %s, number %d: %s (%s)",
                sample.index,
                self.split,
                len(self._known),
                sample.path,
                sample.cause,
            )

    def _read_lines(self, text: bytes) -> None:
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                split, index = entry["split"], int(entry["index"])
                sample = BadSample(index=index, path=str(entry["path"]), cause=str(entry["cause"]))
            except (ValueError, KeyError, TypeError):
                continue  # half a line of a run that was killed: it is met again and written whole
            if split == self.split and 0 <= index < self.num_samples:
                self._known.setdefault(sample.path, sample)

    def _complaint(self) -> str:
        samples = sorted(self._known.values(), key=lambda sample: sample.index)
        lines = [
            f"{len(samples)} of {self.num_samples} samples of {self.split} cannot be read, more than "
            f"DATA.MAX_BAD_FRACTION = {self.max_fraction:g} allows:"
        ]
        lines += [f"  {sample.index}: {sample.path}: {sample.cause}" for sample in samples[:LISTED]]
        if len(samples) > LISTED:
            lines.append(f"  ... and {len(samples) - LISTED} more")
        if self.path is not None:
            lines.append(f"All of them are listed in {self.path}.")
        lines.append("Mend or remove these files (and delete that list), or raise DATA.MAX_BAD_FRACTION.")
        return "\n".join(lines)


@contextlib.contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    """Keeps other ranks of this machine out while one reads and appends; does without where locks do not
    exist."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # some network file systems know no locks
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    yield  # closing the file releases the lock
