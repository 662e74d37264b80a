"""Folders of images: one folder a class, and reading what real data sets contain."""

import contextlib
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from maskfeat.batch import BadSample, SampleKey
from maskfeat.data.bad_samples import UnreadableSample, naming_sample, open_regular_file
from maskfeat.data.collate import DrawHidden, Sample, draw_mask, first_readable
from maskfeat.data.device_transforms import Pixels
from maskfeat.data.rng import seeded
from maskfeat.data.transforms import ImageTransform, Picture

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 80_000_000
"""Of one image; below Pillow's own limit (89 million), so that nothing larger is ever decoded."""
MAX_SCANS = 100
"""Of a JPEG file; progressive ones have 10 or so. Each is a pass over the whole picture, and may take 12 bytes."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageList = list[tuple[str, int]]


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """The class names of a split: its folders sorted by name; hidden ones, as some tools leave, are no classes."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def list_image_folder(
    root: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> tuple[ImageList, list[str]]:
    """Lists `root/<class>/<image>`.

    Args:
        root: a split's folder, such as DATA.PATH_TO_DATA_DIR/train.
        classes: the class names in the order of their numbers; None takes the folders of `root`, sorted by
            name. A validation set that lacks some classes needs the training set's names here.

    Returns:
        [(path, class number)] sorted by class and name, and the class names.

    Raises:
        ValueError: no such folder, no image in it, or a folder that `classes` does not know.
    """
    root = Path(root)
    layout = "DATA.PATH_TO_DATA_DIR must hold train/ and val/ with one folder a class: train/<class>/<image>.JPEG"
    if not root.is_dir():
        raise ValueError(f"no folder {root}: {layout}")
    folders = class_folders(root)
    names = folders if classes is None else list(classes)
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise ValueError(
            f"{root} has {len(unknown)} class folders that the training set lacks ({', '.join(unknown[:5])}): {layout}"
        )
    number = {name: place for place, name in enumerate(names)}
    samples: ImageList = []
    empty = []
    for folder in folders:
        files = sorted(entry.path for entry in os.scandir(root / folder) if entry.name.lower().endswith(SUFFIXES))
        samples += [(path, number[folder]) for path in files]
        if not files:
            empty.append(folder)
    if not samples:
        raise ValueError(f"no image ({', '.join(SUFFIXES)}) in the class folders of {root}: {layout}")
    if empty:
        logger.warning("%d class folders of %s hold no image: %s", len(empty), root, ", ".join(empty[:20]))
    return samples, names


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """A picture whose header alone has been read, and its file; what goes wrong inside is an UnreadableSample."""
    with open_regular_file(path) as file:
        try:
            _check_webp(path, file)
            with Image.open(file, formats=FORMATS) as image:
                _check_size(path, image.width, image.height)
                if image.format != "PNG" and image.format != "WEBP":
                    _check_scans(path, file)
                yield file, image
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UnreadableSample(path, f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from error
        except Image.UnidentifiedImageError as error:
            raise UnreadableSample(path, f"not a {', '.join(FORMATS)} picture") from error
        except UnreadableSample:
            raise
        # What Pillow's parsers raise on damaged files.
        except (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, struct.error) as error:
            raise UnreadableSample(path, f"damaged picture ({error})") from error


def _check_size(path: str | os.PathLike[str], width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableSample(path, f"{width}x{height} pixels, more than {MAX_PIXELS / 1e6:.0f} million")


def _check_webp(path: str | os.PathLike[str], file: BinaryIO) -> None:
    """The canvas of an animation, which Pillow allocates before it tells its size."""
    start = file.read(30)
    file.seek(0)
    if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X":
        _check_size(path, *(1 + int.from_bytes(start[place : place + 3], "little") for place in (24, 27)))


def _check_scans(path: str | os.PathLike[str], file: BinaryIO) -> None:
    place = file.tell()
    file.seek(0)
    # In the data of a scan, no 0xff stands before 0xda; in the blocks before it, a few at most do.
    scans = sum(block.count(b"\xff\xda") for block in iter(lambda: file.read(1 << 22), b""))
    file.seek(place)
    if scans > MAX_SCANS:
        raise UnreadableSample(path, f"more than {MAX_SCANS} passes over the picture")


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a JPEG, PNG or WebP file, told by its content and not by its name.

    Returns:
        An RGB image, turned as its EXIF orientation says. Grey, palette, CMYK and 16-bit pictures are
        converted; alpha is dropped.

    Raises:
        UnreadableSample: missing, empty, another format, more than MAX_PIXELS, damaged or cut short.
    """
    with _opened(path) as (_, image):
        orientation = _orientation(image)
        image.load()
        picture = _to_rgb(image)
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


def read_tensor(path: str | os.PathLike[str]) -> Tensor:
    """What `read_image` reads, the same pixels, as (H, W, 3) uint8: JPEG files by torchvision's decoder.

    Whatever that decoder does not take, or might show otherwise than Pillow, is read by Pillow: other formats, CMYK,
    pictures that are to be turned, damaged files; and all of them where a torchvision has no decoder any more, which it
    announces.
    """
    with _opened(path) as (file, image):
        decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)
        if decode_jpeg is None:
            pass
        elif image.format == "JPEG" and image.mode in ("RGB", "L") and _orientation(image) not in _TURNS:
            file.seek(0)
            data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):  # what it raises on damage; Pillow then finds the words
                pixels = decode_jpeg(data, mode="RGB").permute(1, 2, 0)
                if pixels.shape[:2] == (image.height, image.width):
                    return pixels
    return torch.from_numpy(np.array(read_image(path)))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error):
        return 1  # a broken EXIF block does not spoil the picture


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255 instead of scaling
        values = np.asarray(image)
        grey = np.empty(values.shape, np.uint8)
        for top in range(0, len(values), 256):  # in strips: of a large picture, whole copies would fill the memory
            grey[top : top + 256] = np.clip(values[top : top + 256], 0, 65535) // 257
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


READERS: dict[str, Callable[[str], Picture]] = {"pil": read_image, "torchvision": read_tensor}
"""By DATA_LOADER.IMAGE_BACKEND. What they read is the same; transforms resize an image by Pillow, a tensor by torch."""


class ImageFolder(Dataset[list[Sample]]):
    """Images with their classes, augmented.

    Args:
        samples: [(path, class number)], see `list_image_folder`.
        transform: an image and a generator into pixels that end as (3, crop, crop).
        seed: of all draws.
        draw_hidden: draws a mask for every view; None where the method hides nothing here.
        replace_bad: True shows the next readable image in place of one that cannot be read (training);
            False shows zeros.
        num_views: how many augmentations of each image a key asks for (repeated augmentation).
        backend: what decodes and resizes, a key of `READERS`.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        transform: ImageTransform,
        seed: int,
        draw_hidden: DrawHidden | None = None,
        replace_bad: bool = True,
        num_views: int = 1,
        backend: str = "pil",
    ) -> None:
        self.read = READERS[backend]
        self.samples = list(samples)
        self.transform = transform
        self.seed = seed
        self.draw_hidden = draw_hidden
        self.replace_bad = replace_bad
        self.num_views = num_views

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> list[int]:
        """The class of every sample."""
        return [label for _, label in self.samples]

    def path(self, index: int) -> str:
        """The file of a sample."""
        return self.samples[index][0]

    def __getitem__(self, key: Any) -> list[Sample]:
        """All views of the sample that `key` (a SampleKey) names: `num_views` of them, from view `key.view`
        on."""
        key = SampleKey(*key)
        image, index, bad = first_readable(self, lambda place: self.read(self.path(place)), key.index)
        with naming_sample(self.path(index)):
            return [self._view(image, key, key.view + i, index, bad) for i in range(self.num_views)]

    def _view(self, image: Picture | None, key: SampleKey, view: int, index: int, bad: tuple[BadSample, ...]) -> Sample:
        with seeded(self.seed, key.epoch, key.index, view) as rng:
            clip = self._unreadable() if image is None else self.transform(image, rng)
        hidden = draw_mask(self.draw_hidden, self.seed, key.epoch, key.index, view)
        return Sample(clip, self.samples[index][1], hidden, index, bad)

    def _unreadable(self) -> Pixels:
        return Pixels.unreadable((3, self.transform.crop, self.transform.crop))
