"""One sample in a shard, and how it is opened without unpacking anything."""

import io
import os
from contextlib import suppress
from functools import lru_cache
from typing import BinaryIO

from maskfeat.data.shards.files import Stamp, changed, is_parquet, max_open, stamp_of
from maskfeat.data.shards.parquet import open_row
from maskfeat.errors import UserError
from maskfeat.file_io import NotReadable

SEPARATOR = "::"
"""Between the file and the member in the name of a sample: train-000000.tar::n01440764/n01440764_10026.JPEG."""
_BUFFER = 1 << 20
"""Bytes that are read at once, at most: a whole image, a part of a video."""


class Member(str):
    """The name of a sample in a shard, which also knows where it lies. It is text wherever a path is expected.

    Attributes:
        shard: the file that it lies in.
        stamp: that the file had when its index was made.
        place: (offset, bytes) in a tar archive, (row group, row in it) in a parquet file.
    """

    __slots__ = ("place", "shard", "stamp")
    shard: str
    stamp: Stamp
    place: tuple[int, int]

    def __new__(cls, shard: str, name: str, stamp: Stamp, place: tuple[int, int]) -> "Member":
        """Name the member `name` of `shard`."""
        member = super().__new__(cls, shard + SEPARATOR + name)
        member.shard, member.stamp, member.place = shard, stamp, place
        return member

    def __reduce__(self) -> tuple[type["Member"], tuple[str, str, Stamp, tuple[int, int]]]:
        return Member, (self.shard, self[len(self.shard) + len(SEPARATOR) :], self.stamp, self.place)

    def open(self) -> BinaryIO:
        """Open it for reading, as a file of its own.

        Raises:
            NotReadable: it is empty, or its shard is not there.
            UserError: the shard is another one than when its index was made.
        """
        if is_parquet(self.shard):
            return open_row(self.shard, self.stamp, self.place)
        if not self.place[1]:
            raise NotReadable("the file is empty")
        return io.BufferedReader(_Section(self), min(self.place[1], _BUFFER))


class _Handle:
    """An open shard. It is closed when nothing refers to it any more: it may fall out of the cache while it is read."""

    def __init__(self, path: str, stamp: Stamp) -> None:
        self.descriptor = -1
        try:
            if stamp_of(path) != stamp:
                raise changed(path)
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise NotReadable(f"no such file as {path}") from None
        except UserError:
            raise
        except OSError as error:
            raise NotReadable(f"{path} cannot be opened: {error.strerror or error}") from error

    def __del__(self) -> None:
        if self.descriptor >= 0:
            with suppress(OSError):
                os.close(self.descriptor)


# A descriptor has one position for all processes that were forked; `pread` does not use it.
_handle = lru_cache(maxsize=max_open())(_Handle)


class _Section(io.RawIOBase):
    """Some bytes of an open shard, as a file of their own."""

    def __init__(self, member: Member) -> None:
        self.name = member  # FFmpeg looks at the ending
        self._handle = _handle(member.shard, member.stamp)
        self._start, self._size = member.place
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if position < 0:
            raise OSError(f"a position before the start of {self.name}")
        self._position = position
        return position

    def readinto(self, buffer: "memoryview", /) -> int:  # type: ignore[override]
        wanted = max(min(len(buffer), self._size - self._position), 0)
        found = os.pread(self._handle.descriptor, wanted, self._start + self._position)
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)
