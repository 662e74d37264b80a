"""The members of an archive that `torch.save` is to have written, uncompressed and one after the other."""

import struct
import zipfile
from collections.abc import Mapping
from typing import BinaryIO


class Refused(ValueError):
    """A file that is damaged, or is more than weights and plain values; its text is the cause."""


def demand(condition: object, cause: str) -> None:
    """Refuses a file unless `condition` holds."""
    if not condition:
        raise Refused(cause)


def members(file: BinaryIO) -> Mapping[str, tuple[int, int]]:
    """Where the bytes of each member begin and how many they are.

    Readers of archives differ in what they make of odd ones. What passes here means the same to all of them.
    """
    end = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        directory = archive.start_dir
        demand(not archive.comment, "its archive ends in a comment")
    demand(infos, "its archive is empty")
    _one_directory(file, directory, end)
    found: dict[str, tuple[int, int]] = {}
    previous = 0
    for info in infos:
        demand(
            info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size,
            "its archive is compressed, which PyTorch's are not",
        )
        demand(not info.flag_bits & 0x2041, "its archive is encrypted")
        name = info.orig_filename
        demand(name.isascii() and name.isprintable(), "its archive has a name that is none")
        demand(info.header_offset == previous, "the members of its archive do not follow one another")
        file.seek(info.header_offset)
        header = file.read(30)
        demand(header[:4] == b"PK\3\4", "its archive is damaged")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        demand(file.read(name_length).decode("utf-8") == name, "a member of its archive has two names")
        start = info.header_offset + 30 + name_length + extra_length
        found[name] = start, info.file_size
        previous = _after(file, start + info.file_size, info, directory)
    demand(previous == directory, "the members of its archive do not follow one another")
    demand(len({name.lower() for name in found}) == len(infos), "its archive has a member twice")
    return found


def _after(file: BinaryIO, end: int, info: zipfile.ZipInfo, directory: int) -> int:
    """Where the next header is to begin: after the bytes and, where one was written, the descriptor that follows."""
    demand(end <= directory, "its archive is damaged")
    if not info.flag_bits & 0x08:
        return end
    file.seek(end)
    descriptor = file.read(20)
    demand(descriptor[:4] == b"PK\7\10", "its archive is damaged")
    return end + (16 if descriptor[16:] in (b"PK\3\4", b"PK\1\2") else 24)


def _one_directory(file: BinaryIO, directory: int, end: int) -> None:
    """One directory, right before the one record that ends the file."""
    cause = "its archive has something after its directory"
    file.seek(end - 22)
    record = file.read(22)
    demand(record[:4] == b"PK\5\6" and record[4:8] == b"\0\0\0\0", cause)
    size, offset = struct.unpack("<II", record[12:20])
    behind = end - 22
    file.seek(max(end - 42, 0))
    locator = file.read(20)
    if locator[:4] == b"PK\6\7":
        (behind,) = struct.unpack("<Q", locator[8:16])
        demand(behind == end - 98, cause)
        file.seek(behind)
        record = file.read(56)
        demand(record[:4] == b"PK\6\6", cause)
        size, offset = struct.unpack("<QQ", record[40:56])
    demand(offset == directory and offset + size == behind, cause)
