"""Image files made by hand, where Pillow would not write what they hold."""

import struct


def tiff(width: int, height: int, bits: int, data: bytes) -> bytes:
    """A grey TIFF of one strip that is not compressed."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    end = 8 + len(data) + len(data) % 2
    head = struct.pack("<2sHI", b"II", 42, end) + data
    return head.ljust(end, b"\0") + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def overlapping_tags(number: int, size: int) -> bytes:
    """A TIFF with many tags, whose values all are the same `size` bytes."""
    image = tiff(8, 8, 8, b"\0" * 64)
    (end,) = struct.unpack_from("<I", image, 4)
    own = image[end + 2 : -4]
    where = end + 6 + len(own) + 12 * number
    tags = b"".join(struct.pack("<HHII", 300 + n, 1, size, where) for n in range(number))
    count = struct.pack("<H", len(own) // 12 + number)
    return image[:end] + count + own + tags + struct.pack("<I", 0) + b"\0" * size


def run_lengths(width: int, height: int, pixels: bytes = b"\0\2\0\xff" * 8 + b"\0\1") -> bytes:
    """A run-length encoded BMP of 8 bits; its pixels skip 255 rows at a time."""
    start = 14 + 40 + 1024
    head = struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start)
    head += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    return head + bytes(range(256)) * 4 + pixels
