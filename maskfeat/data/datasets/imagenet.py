"""Image data sets in the layout of ImageNet: one folder per class."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from yacs.config import CfgNode

from maskfeat.batch import BadSample, SampleKey
from maskfeat.data.bad_samples import error_context, read_with_fallback
from maskfeat.data.datasets.base import DatasetRequest, augmentation, num_views
from maskfeat.data.image_reader import READERS, SUFFIXES
from maskfeat.data.rng import draw_mask, seeded
from maskfeat.data.sample import Sample, unreadable_sample
from maskfeat.data.transforms import ImageEvalTransform, ImageTrainTransform, ImageTransform, RGBImage
from maskfeat.errors import UserError
from maskfeat.masking import MaskSampler
from maskfeat.registry import DatasetSpec, register

logger = logging.getLogger(__name__)


ImageList = list[tuple[str, int]]


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """Return the class names of a split: the names of its folders, sorted, without hidden folders."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def list_image_folder(
    root: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> tuple[ImageList, list[str]]:
    """List the images of `root/<class>/<image>`.

    Args:
        root: the folder of a split, such as DATA.PATH_TO_DATA_DIR/train.
        classes: class names in the order of their indices; None = the folders of `root`, sorted by name. Pass the names
            of the training set for a validation set that lacks some classes.

    Returns:
        [(path, class index)] sorted by class and name, and the class names.

    Raises:
        UserError: the folder does not exist, contains no image, or contains a class that is not in `classes`.
    """
    root = Path(root)
    layout = "DATA.PATH_TO_DATA_DIR must hold train/ and val/ with one folder a class: train/<class>/<image>.JPEG"
    if not root.is_dir():
        raise UserError(f"no folder {root}: {layout}")
    folders = class_folders(root)
    names = folders if classes is None else list(classes)
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise UserError(
            f"{root} has {len(unknown)} class folders that the training set lacks ({', '.join(unknown[:5])}): {layout}"
        )
    class_index = {name: index for index, name in enumerate(names)}
    samples: ImageList = []
    empty = []
    for folder in folders:
        files = sorted(entry.path for entry in os.scandir(root / folder) if entry.name.lower().endswith(SUFFIXES))
        samples += [(path, class_index[folder]) for path in files]
        if not files:
            empty.append(folder)
    if not samples:
        raise UserError(f"no image ({', '.join(SUFFIXES)}) in the class folders of {root}: {layout}")
    if empty:
        logger.warning("%d class folders of %s hold no image: %s", len(empty), root, ", ".join(empty[:20]))
    return samples, names


class ImageFolder(Dataset[list[Sample]]):
    """Images with class labels. A SampleKey maps to `num_views` augmented views of one image.

    Args:
        samples: [(path, class index)], see `list_image_folder`.
        transform: the augmentation, see `ImageTransform`.
        seed: of all random draws.
        draw_hidden: draws a mask for every view; None = no masks.
        replace_bad: True replaces an image that cannot be read by the next readable one (training); False replaces it
            by zeros.
        num_views: number of augmented views per key (repeated augmentation).
        backend: of decoding and resizing, a key of `READERS`.
    """

    views = 1

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        transform: ImageTransform,
        seed: int,
        draw_hidden: MaskSampler | None = None,
        replace_bad: bool = True,
        num_views: int = 1,
        backend: str = "pil",
    ) -> None:
        self.read = READERS[backend]
        self.samples = list(samples)
        self.labels = [label for _, label in self.samples]
        self.transform = transform
        self.seed = seed
        self.draw_hidden = draw_hidden
        self.replace_bad = replace_bad
        self.num_views = num_views

    def __len__(self) -> int:
        return len(self.samples)

    def path(self, index: int) -> str:
        """Return the file of a sample."""
        return self.samples[index][0]

    def __getitem__(self, key: Any) -> list[Sample]:
        """Return `num_views` views of the sample of `key` (a SampleKey), from view `key.view` on."""
        key = SampleKey(*key)
        image, index, bad = read_with_fallback(self, lambda index: self.read(self.path(index)), key.index)
        with error_context(self.path(index)):
            return [self._view(image, key, key.view + i, index, bad) for i in range(self.num_views)]

    def _view(
        self, image: RGBImage | None, key: SampleKey, view: int, index: int, bad: tuple[BadSample, ...]
    ) -> Sample:
        if image is None:
            sample = unreadable_sample((3, self.transform.crop, self.transform.crop))
        else:
            with seeded(self.seed, key.epoch, key.index, view) as rng:
                sample = self.transform(image, rng)
        hidden = draw_mask(self.draw_hidden, self.seed, key.epoch, key.index, view)
        return replace(sample, label=self.labels[index], hidden=hidden, index=index, bad=bad)


def build_image_folder(cfg: CfgNode, request: DatasetRequest, samples: Sequence[tuple[str, int]]) -> ImageFolder:
    """Return images [(path, class number)] with the transforms that the config describes."""
    data = cfg.DATA
    if request.augmented:
        transform: ImageTrainTransform | ImageEvalTransform = ImageTrainTransform(
            scale=data.TRAIN_JITTER_SCALES_RELATIVE or (0.08, 1.0),
            ratio=data.TRAIN_JITTER_ASPECT_RELATIVE or (3 / 4, 4 / 3),
            color_jitter=cfg.AUG.COLOR_JITTER if cfg.AUG.ENABLE else None,
            **augmentation(cfg),
        )
    else:
        transform = ImageEvalTransform(
            data.TEST_CROP_SIZE,
            data.MEAN,
            data.STD,
            short_side=data.TEST_SHORT_SIDE or int(1 / data.IN_VAL_CROP_RATIO * data.TEST_CROP_SIZE),
            interpolation=data.TEST_INTERPOLATION,
        )
    return ImageFolder(
        samples,
        transform,
        seed=cfg.RNG_SEED,
        draw_hidden=request.draw_hidden,
        replace_bad=request.augmented,
        num_views=num_views(cfg, request),
        backend=cfg.DATA_LOADER.IMAGE_BACKEND,
    )


def build_imagenet(cfg: CfgNode, request: DatasetRequest) -> ImageFolder:
    """Return a split of DATA.PATH_TO_DATA_DIR; "test" reads val/.

    The folders of train/ number the classes, where there is one.
    """
    root, split = Path(cfg.DATA.PATH_TO_DATA_DIR), request.split
    classes = class_folders(root / "train") if split != "train" and (root / "train").is_dir() else None
    samples, _ = list_image_folder(root / ("train" if split == "train" else "val"), classes)
    return build_image_folder(cfg, request, samples)


register(DatasetSpec(name="imagenet", media="image", build=build_imagenet))
