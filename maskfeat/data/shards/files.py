"""The files that samples lie in: their kind and state, and how many are held open."""

import os
from typing import NamedTuple

from maskfeat.errors import UserError

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]


class Stamp(NamedTuple):
    """What tells one state of a file from another: bytes, and when it was last changed, in ns."""

    size: int
    changed: int


def stamp_of(path: str) -> Stamp:
    """Return the stamp of a file.

    Raises:
        OSError: there is none.
    """
    status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns)


def is_parquet(path: str) -> bool:
    """Return whether a shard is a parquet file and not a tar archive."""
    return path.lower().endswith(".parquet")


def changed(path: str) -> UserError:
    """Return the error of a shard that is another one than its index says."""
    return UserError(f"{path} has changed since its index was made: start the run again, which makes it anew")


def max_open() -> int:
    """Return how many shards a process holds open: half of the files that it may (ulimit -n), 4096 at most."""
    soft = 512 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(soft // 2, 4096) if soft > 0 else 4096  # no limit is -1
