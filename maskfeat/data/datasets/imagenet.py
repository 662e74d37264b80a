"""Image data sets in the layout of ImageNet: one folder per class."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from yacs.config import CfgNode

from maskfeat.batch import BadSample, SampleKey
from maskfeat.data.bad_samples import error_context, read_with_fallback
from maskfeat.data.datasets.base import DatasetRequest, augmentation, num_views
from maskfeat.data.datasets.folders import LAYOUT, FolderScan, class_folders, class_name, count, scan_folder, some
from maskfeat.data.image_reader import READERS, load_decoder, read_tensor
from maskfeat.data.rng import draw_mask, seeded
from maskfeat.data.sample import Sample, unreadable_sample
from maskfeat.data.transforms import ImageEvalTransform, ImageTrainTransform, ImageTransform, RGBImage
from maskfeat.errors import UserError
from maskfeat.masking import MaskSampler
from maskfeat.registry import DatasetSpec, objective_spec, register

ImageList = list[tuple[str, int]]


def list_image_folder(
    root: str | os.PathLike[str] | FolderScan, classes: Sequence[str] | None = None, whose: str = "the training set"
) -> tuple[ImageList, list[str]]:
    """List the images of `root/<class>/`, at any depth.

    Args:
        root: the folder of a split, such as DATA.PATH_TO_DATA_DIR/train, or a scan of it.
        classes: class names in the order of their indices; None = the folders of `root`, sorted by name. Pass the names
            of the training set for a validation set that lacks some classes.
        whose: what `classes` belong to, for messages.

    Returns:
        [(path, class index)] sorted by class and name, and the class names.

    Raises:
        UserError: the folder does not exist, contains no image or leaves out most of them, or contains a class that is
            not in `classes`.
    """
    scan = root if isinstance(root, FolderScan) else scan_folder(root)
    names = list(scan.images) if classes is None else [class_name(name) for name in classes]
    class_index = {name: index for index, name in enumerate(names)}
    unknown = [name for name in scan.images if name not in class_index]
    if unknown:
        alike = {_without_case(name): name for name in names}
        shown = [
            f"{name} ({alike[_without_case(name)]} but for case or spaces)" if _without_case(name) in alike else name
            for name in unknown
        ]
        raise UserError(
            f"{scan.root} has {count(len(unknown), 'class folder')} that {whose} lacks ({some(shown)}): {LAYOUT}"
        )
    scan.check_share()
    return [(path, class_index[name]) for name, files in scan.images.items() for path in files], names


def _without_case(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


class ImageFolder(Dataset[list[Sample]]):
    """Images with class labels. A SampleKey maps to `num_views` augmented views of one image.

    Args:
        samples: [(path, class index)], see `list_image_folder`; not copied.
        transform: the augmentation, see `ImageTransform`.
        seed: of all random draws.
        draw_hidden: draws a mask for every view; None = no masks.
        replace_bad: True replaces an image that cannot be read by the next readable one (training); False replaces it
            by zeros.
        num_views: number of augmented views per key (repeated augmentation).
        backend: of decoding and resizing, a key of `READERS`.

    Attributes:
        classes: their names by their numbers; None = not known.
        place, left_out: where the images are and what else is there, in words, for the log.
    """

    views = 1
    classes: list[str] | None = None
    place = ""
    left_out = ""

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
        if self.read is read_tensor:  # raises here, not at the first image, if the decoder is not installed
            load_decoder()
        self.samples = samples
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
            with seeded(self.seed, key.epoch, key.index, view, self.transform.libraries) as rng:
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
    """Return a split of DATA.PATH_TO_DATA_DIR; "test" reads test/ where it has class folders, else val/.

    `request.classes` number the classes, else the folders of train/, where there is one.
    """
    root, split, names = Path(cfg.DATA.PATH_TO_DATA_DIR), request.split, request.classes
    whose = "the checkpoint" if split == "test" and names is not None else "the training set"
    if names is None and split != "train" and (root / "train").is_dir():
        names = class_folders(root / "train") or None
    scan, note = _test_folder(root, names) if split == "test" else (scan_folder(root / split), "")
    if names is None and objective_spec(cfg).classifies:
        scan.check_numbers(cfg.MODEL.NUM_CLASSES)
    samples, classes = list_image_folder(scan, names, whose)
    images = build_image_folder(cfg, request, samples)
    images.classes, images.place, images.left_out = classes, f"folder {scan.root}{note}", scan.left_out_in_words()
    return images


def _test_folder(root: Path, names: Sequence[str] | None) -> tuple[FolderScan, str]:
    """Return a scan of test/, or of val/ where test/ has no labelled image, and a note which it is."""
    test, val = root / "test", root / "val"
    if not test.is_dir():
        return scan_folder(val), f" (there is no {test})"
    scan = scan_folder(test)
    known = set(scan.images) if names is None else {class_name(name) for name in names}
    if val.is_dir() and not any(files and name in known for name, files in scan.images.items()):
        return scan_folder(val), f" ({test} has no image in a class folder)"
    return scan, ""


def check_images(cfg: CfgNode) -> Iterator[str]:
    """Yield the problems of keys that `build_imagenet` reads."""
    if cfg.DATA.CLASS_NAMES:
        yield (
            f"DATA.CLASS_NAMES is {cfg.DATA.CLASS_NAMES!r}, and names the classes of lists: those of imagenet have the "
            "names of their folders"
        )


register(DatasetSpec(name="imagenet", media="image", build=build_imagenet, check=check_images))
