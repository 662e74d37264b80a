"""Safe decoding of image files: formats on an allow-list, a size limit, EXIF orientation, conversion to RGB."""

import contextlib
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from maskfeat.data.bad_samples import UnreadableSample, open_regular_file
from maskfeat.data.transforms import RGBImage
from maskfeat.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

MAX_PIXELS = 80_000_000
"""Of one image. Below Pillow's own limit (89 million), so that nothing larger is decoded."""

MAX_SCANS = 100
"""Of a JPEG file; progressive files have about 10. Each is a pass over the whole image, and may take only 12 bytes."""

_JPEG = b"\xff\xd8"
_HARMLESS_MARKERS = (0xFFDB, 0xFFC4, 0xFFDD, 0xFFFE, 0xFFE0, *range(0xFFE2, 0xFFF0))
"""Segments of a JPEG file that neither turn the image nor say how it is coded: tables, comments, all but APP1."""

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.S)
"""Of a JPEG: in the data of a scan, 0xff is followed by 0 or a restart."""
_END_OF_IMAGE, _START_OF_SCAN, _WITHOUT_A_LENGTH = 0xD9, 0xDA, (0x01, 0xD8)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """Open an image and read its header only. Decoding errors in the block are raised as UnreadableSample."""
    with open_regular_file(path) as file:
        try:
            _check_webp(path, file)
            _check_tiff(path, file)
            with Image.open(file, formats=FORMATS) as image:
                _check_size(path, image.width, image.height)
                if image.format in ("JPEG", "MPO"):  # in a TIFF, libtiff has the same limit
                    _check_scans(path, file)
                if image.format == "BMP" and any(tile.codec_name == "bmp_rle" for tile in image.tile):
                    # Pillow decodes these in Python, pixel by pixel or up to 255 rows at a time.
                    _check_size(path, image.width, max(image.height, 255), MAX_PIXELS // 10)
                if problem := _no_range(image):
                    raise UnreadableSample(path, problem)
                yield file, image
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UnreadableSample(path, f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from error
        except Image.UnidentifiedImageError as error:
            raise UnreadableSample(path, f"not a {', '.join(FORMATS)} image") from error
        except UnreadableSample:
            raise
        # What Pillow's parsers raise on damaged files.
        except (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, struct.error) as error:
            raise UnreadableSample(path, f"damaged image ({error})") from error


def _no_range(image: Image.Image) -> str:
    """Return why the values of an image cannot be scaled to those of a picture; "" = they can."""
    signed = image.mode == "F" or (image.mode == "I" and image.format in ("TIFF", None))  # None: made of an array
    return "its samples have 32 bits or a sign, and no known range" if signed else ""


def _check_size(path: str | os.PathLike[str], width: int, height: int, limit: int = MAX_PIXELS) -> None:
    if width * height > limit:
        raise UnreadableSample(path, f"{width}x{height} pixels, more than {limit / 1e6:.0f} million")


def _check_webp(path: str | os.PathLike[str], file: BinaryIO) -> None:
    """Check the canvas of an animation, which Pillow allocates before it gives its size."""
    start = file.read(30)
    file.seek(0)
    if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X":
        _check_size(path, *(1 + int.from_bytes(start[offset : offset + 3], "little") for offset in (24, 27)))


def _check_tiff(path: str | os.PathLike[str], file: BinaryIO) -> None:
    """Check the tags of the first page of a TIFF: Pillow before 13 keeps the values of all, even where they overlap."""
    start = file.read(16)
    if start[:2] in (b"II", b"MM") and start[2:4] in (b"*\0", b"\0*", b"+\0", b"\0+"):
        order, big = "<" if start[:2] == b"II" else ">", start[2] == ord("+")  # as Pillow decides
        file.seek(struct.unpack_from(f"{order}{'Q' if big else 'L'}", start, 8 if big else 4)[0])
        number = struct.unpack(f"{order}{'Q' if big else 'H'}", file.read(8 if big else 2))[0]
        here = file.tell()
        size, claimed = file.seek(0, os.SEEK_END), 0
        file.seek(here)
        for _ in range(number):
            if len(entry := file.read(20 if big else 12)) < 12:
                break
            kind, count = struct.unpack_from(f"{order}xxH{'Q' if big else 'L'}", entry)
            claimed += min(count * _TAG_BYTES.get(kind, 0), size)
        if claimed > 4 * size + (1 << 20):
            raise UnreadableSample(path, "its tags claim more bytes than it has")
    file.seek(0)


def _check_scans(path: str | os.PathLike[str], file: BinaryIO) -> None:
    position = file.tell()
    file.seek(0)
    # The data of a scan cannot contain the marker 0xffda. What follows the image can: phones append a film.
    scans = sum(block.count(b"\xff\xda") for block in iter(lambda: file.read(1 << 22), b""))
    if scans > MAX_SCANS:
        file.seek(0)
        scans = _scans(file.read())
    file.seek(position)
    if scans > MAX_SCANS:
        raise UnreadableSample(path, f"more than {MAX_SCANS} passes over the image")


def _scans(content: bytes) -> int:
    """Return the number of scans of a JPEG, up to the end of the image."""
    position = number = 0
    while found := _MARKER.search(content, position):
        kind, position = found[0][-1], found.end()
        if kind == _END_OF_IMAGE:
            break
        if kind not in _WITHOUT_A_LENGTH:
            position += int.from_bytes(content[position : position + 2], "big")
        number += kind == _START_OF_SCAN
    return number


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a file of one of `FORMATS`, recognised by its content and not by its name.

    Returns:
        An RGB image, rotated by its EXIF orientation: the first of an animation or of several pages. Grey, palette,
        CMYK and 16-bit images are converted; alpha is dropped.

    Raises:
        UnreadableSample: missing, empty, another format, more than MAX_PIXELS, damaged or cut short.
    """
    with _opened(path) as (_, image):
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image in RGB, rotated by its EXIF orientation, as `read_image` returns that of a file.

    Raises:
        ValueError: its values have no known range.
        OSError: its file is damaged.
    """
    if problem := _no_range(image):
        raise ValueError(problem)
    image.load()
    orientation = _orientation(image)  # only now: loading a TIFF rotates it, and removes the tag
    rgb = _to_rgb(image)
    return rgb.transpose(_ROTATIONS[orientation]) if orientation in _ROTATIONS else rgb


def read_tensor(path: str | os.PathLike[str]) -> Tensor:
    """Read the same pixels as `read_image`, as (H, W, 3) uint8, and decode JPEG files by simplejpeg.

    Pillow reads what that decoder does not support or might decode differently: other formats, CMYK, rotated images and
    damaged files. It also reads the header, but for the most common kind of file, see `_plain_jpeg_size`.
    """
    data = b""
    with open_regular_file(path) as file, contextlib.suppress(OSError):  # Pillow meets it again, and gives the cause
        if file.read(2) == _JPEG:
            data = _JPEG + file.read()
    size = _plain_jpeg_size(data)
    if data and size is None:
        with _opened(path) as (_, image):
            if image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) not in _ROTATIONS:
                size = (image.height, image.width)
    if size is not None and math.prod(size) <= MAX_PIXELS:
        with contextlib.suppress(ValueError):  # raised for damaged files, for which Pillow then gives the cause
            pixels = load_decoder()(data)
            if pixels.shape[:2] == size:
                return torch.from_numpy(pixels)
    return torch.from_numpy(np.array(read_image(path)))


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG file whose header is read here in a tenth of the time that Pillow takes.

    Baseline coding, RGB or grey, one pass over the image, and nothing that may hold an orientation; None = not so.
    """
    position, size = 2, None
    with contextlib.suppress(struct.error, IndexError):
        while True:
            marker, length = struct.unpack_from(">HH", data, position)
            if marker == 0xFFC0 and size is None and data[position + 4] == 8 and data[position + 9] in (1, 3):
                size, channels = struct.unpack_from(">HH", data, position + 5), data[position + 9]
            elif marker == 0xFFDA and size is not None:
                return size if data[position + 4] == channels and 0 not in size else None
            elif marker not in _HARMLESS_MARKERS:
                return None
            position += 2 + length
    return None


def load_decoder() -> Callable[[bytes], np.ndarray]:
    """Import and return the decoder of `read_tensor`.

    Raises:
        UserError: simplejpeg is not installed.
    """
    try:
        from simplejpeg import decode_jpeg
    except ImportError as error:
        raise UserError(
            f"DATA_LOADER.IMAGE_BACKEND simplejpeg needs the package simplejpeg (pip install '.[simplejpeg]'): {error}"
        ) from error
    return decode_jpeg


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error):
        return 1  # the image may be fine although its EXIF block is damaged


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; Pillow's conversion would clip at 255 instead of scaling
        values = np.asarray(image)
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        full = 4095 if tags.get(_BITS_PER_SAMPLE) in (12, (12,)) else 65535
        grey = np.empty(values.shape, np.uint8)
        for top in range(0, len(values), 256):  # in strips, because copies of a large image would take too much memory
            grey[top : top + 256] = np.clip(values[top : top + 256], 0, full).astype(np.uint32) * 255 // full
        if tags.get(_PHOTOMETRIC) == 0:  # 0 is white, which Pillow heeds up to 8 bits
            np.subtract(255, grey, out=grey)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "La":  # alpha is multiplied into it already
        image = image.convert("LA")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


READERS: dict[str, Callable[[str], RGBImage]] = {"pil": read_image, "simplejpeg": read_tensor}
"""By DATA_LOADER.IMAGE_BACKEND. Both read the same pixels, but Pillow resizes Pillow images, and torch tensors."""
