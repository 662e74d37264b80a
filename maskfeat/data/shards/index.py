"""The index of each shard, made once and kept in a file beside it, and the samples of many shards as one sequence."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from maskfeat.data.shards.files import Stamp, changed, is_parquet, stamp_of
from maskfeat.data.shards.members import Member
from maskfeat.data.shards.parquet import index_parquet
from maskfeat.data.shards.tar_index import Entry, index_tar, is_label
from maskfeat.errors import naming
from maskfeat.file_io import replace_text

logger = logging.getLogger(__name__)

ENDING = ".index.json"
"""Of the index of a shard, after the name of the shard."""
_FORMAT = 1
_SECONDS = 10.0
"""Between two lines of progress."""

Indexer = Callable[[str], tuple[list[Entry], dict[str, int]]]
INDEXERS: dict[str, Indexer] = {".tar": index_tar, ".parquet": index_parquet}
"""By the ending of a shard."""


class ShardIndex(NamedTuple):
    """What lies in a shard.

    Attributes:
        path: of the shard.
        stamp: that it has.
        entries: images and videos, in its order.
        left_out: how many files of which ending are neither, nor hold classes.
    """

    path: str
    stamp: Stamp
    entries: list[Entry]
    left_out: dict[str, int]


def read_indices(paths: Sequence[str]) -> list[ShardIndex]:
    """Return the index of each shard; those that are not there, or are of another state of the shard, are made.

    They are kept beside the shards or, where that folder cannot be written, in `cache_folder()`. Processes that start
    together begin with different shards, and take over what the others have made.

    Raises:
        UserError: a shard cannot be read.
    """
    found = {path: _known(path) for path in paths}
    missing = [path for path, index in found.items() if index is None]
    start, said = os.getpid() % max(len(missing), 1), time.monotonic()
    unkept = 0
    for done, path in enumerate([*missing[start:], *missing[:start]]):
        if time.monotonic() - said >= _SECONDS or not done:
            said = time.monotonic()
            logger.info("making the index of %d of %d shards: %s", done + 1, len(missing), path)
        index = _known(path)
        if index is None:
            index = make_index(path)
            unkept += not keep_index(index)
        found[path] = index
    if unkept:
        logger.info(
            "the index of %d shards could be kept neither beside them nor in %s: it is made anew in each start",
            unkept,
            cache_folder(),
        )
    return [index for index in found.values() if index is not None]


def make_index(path: str) -> ShardIndex:
    """Read through a shard.

    Raises:
        UserError: it cannot be read, or changes meanwhile.
    """
    with naming(f"{path} cannot be read"):
        stamp = stamp_of(path)
    entries, left_out = INDEXERS[os.path.splitext(path)[1].lower()](path)
    with naming(f"{path} cannot be read"):
        if stamp_of(path) != stamp:
            raise changed(path)
    return ShardIndex(path, stamp, entries, left_out)


def cache_folder() -> Path:
    """Return the folder of the indices of shards that lie where nothing can be written."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maskfeat" / "shards"


def _places(path: str) -> Iterator[Path]:
    """Yield where the index of a shard may be kept, the best place first."""
    yield Path(path + ENDING)
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
    yield cache_folder() / f"{digest}{ENDING}"


def _known(path: str) -> ShardIndex | None:
    with naming(f"{path} cannot be read"):
        stamp = stamp_of(path)
    for place in _places(path):
        try:
            content = json.loads(place.read_bytes())
            index = _parse(path, stamp, content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # none, or not one that this program has written: it is made again
        if index is not None:
            return index
    return None


def _parse(path: str, stamp: Stamp, content: Any) -> ShardIndex | None:
    """Return what a file holds; None if it is of another state of the shard, or leads out of it."""
    if (content["format"], content["size"], content["changed"]) != (_FORMAT, *stamp):
        return None
    entries = [Entry(*entry) for entry in content["entries"]]
    in_bytes = not is_parquet(path)
    for name, first, second, label in entries:
        whole = isinstance(name, str) and type(first) is int and type(second) is int and min(first, second) >= 0
        if not whole or (in_bytes and first + second > stamp.size) or not (label is None or is_label(label)):
            return None
    return ShardIndex(path, stamp, entries, {str(kind): int(number) for kind, number in content["left_out"].items()})


def keep_index(index: ShardIndex) -> bool:
    """Write an index where it is looked for, and return whether there was a place that could be written."""
    content = {
        "format": _FORMAT,
        "size": index.stamp.size,
        "changed": index.stamp.changed,
        "left_out": index.left_out,
        "entries": index.entries,
    }
    for place in _places(index.path):
        try:
            if place.parent == cache_folder():
                place.parent.mkdir(parents=True, exist_ok=True)
            replace_text(place, json.dumps(content, separators=(",", ":")))
        except OSError:
            continue
        return True
    return False


class ShardSamples(Sequence[tuple[str, int]]):
    """Samples of shards: [(Member, class number)], in little memory, which forked workers share.

    Args:
        indices: of the shards.
        picked: (number of the index, number of its entry, class number) of each sample, in order.
    """

    def __init__(self, indices: Sequence[ShardIndex], picked: Sequence[tuple[int, int, int]]) -> None:
        self._shards = [(index.path, index.stamp) for index in indices]
        self._shard = np.array([shard for shard, _, _ in picked], np.int32)
        self._label = np.array([label for _, _, label in picked], np.int64)
        chosen = [indices[shard].entries[entry] for shard, entry, _ in picked]
        self._place = np.array([(entry.first, entry.second) for entry in chosen], np.int64).reshape(-1, 2)
        names = [entry.name.encode("utf-8", "surrogatepass") for entry in chosen]
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self._label)

    @overload
    def __getitem__(self, at: int) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, at: slice) -> list[tuple[str, int]]: ...
    def __getitem__(self, at: int | slice) -> tuple[str, int] | list[tuple[str, int]]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        number = range(len(self))[at]  # raises IndexError, and counts from the end
        path, stamp = self._shards[self._shard[number]]
        name = self._names[self._ends[number] : self._ends[number + 1]].decode("utf-8", "surrogatepass")
        first, second = self._place[number].tolist()
        return Member(path, name, stamp, (first, second)), int(self._label[number])
