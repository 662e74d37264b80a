"""Image data sets in the layout of ImageNet: one folder per class."""

from collections.abc import Iterator, Sequence
from typing import Any

from yacs.config import CfgNode

from maskfeat.batch import SampleKey
from maskfeat.data.bad_samples import error_context, read_with_fallback
from maskfeat.data.datasets.base import DatasetRequest, augmentation, num_views
from maskfeat.data.datasets.files import FileSamples
from maskfeat.data.datasets.label_sets import LabelSet
from maskfeat.data.datasets.layouts import check_sources, find_split
from maskfeat.data.image_reader import READERS, load_decoder, read_tensor
from maskfeat.data.rng import seeded
from maskfeat.data.sample import Sample, unreadable_sample
from maskfeat.data.transforms import ImageEvalTransform, ImageTrainTransform, ImageTransform, RGBImage
from maskfeat.masking import MaskSampler
from maskfeat.registry import DatasetSpec, register


class ImageFolder(FileSamples):
    """Images with class labels. A SampleKey maps to `num_views` augmented views of one image.

    Args:
        samples, seed, draw_hidden, replace_bad, num_views, num_classes: see `FileSamples`.
        transform: the augmentation, see `ImageTransform`.
        backend: of decoding and resizing, a key of `READERS`.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int | LabelSet]],
        transform: ImageTransform,
        seed: int,
        draw_hidden: MaskSampler | None = None,
        replace_bad: bool = True,
        num_views: int = 1,
        backend: str = "pil",
        num_classes: int = 0,
    ) -> None:
        super().__init__(samples, seed, draw_hidden, replace_bad, num_views, num_classes)
        self.read = READERS[backend]
        if self.read is read_tensor:  # raises here, not at the first image, if the decoder is not installed
            load_decoder()
        self.transform = transform

    def __getitem__(self, key: Any) -> list[Sample]:
        """Return `num_views` views of the sample of `key` (a SampleKey), from view `key.view` on."""
        key = SampleKey(*key)
        image, index, bad = read_with_fallback(self, lambda index: self.read(self.path(index)), key.index)
        views = range(key.view, key.view + self.num_views)
        with error_context(self.path(index)):
            return [self.labelled(self._view(image, key, view), key, view, index, bad) for view in views]

    def _view(self, image: RGBImage | None, key: SampleKey, view: int) -> Sample:
        if image is None:
            return unreadable_sample((3, self.transform.crop, self.transform.crop))
        with seeded(self.seed, key.epoch, key.index, view, self.transform.libraries) as rng:
            return self.transform(image, rng)


def tested_short_side(cfg: CfgNode) -> int:
    """Return the short side that images of validation and test are resized to before they are cropped, in pixels."""
    data = cfg.DATA
    return int(data.TEST_SHORT_SIDE or 1 / data.IN_VAL_CROP_RATIO * data.TEST_CROP_SIZE)


def build_image_folder(
    cfg: CfgNode, request: DatasetRequest, samples: Sequence[tuple[str, int | LabelSet]]
) -> ImageFolder:
    """Return images [(path, class number or numbers)] with the transforms that the config describes."""
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
            short_side=tested_short_side(cfg),
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
        num_classes=cfg.MODEL.NUM_CLASSES,
    )


def build_imagenet(cfg: CfgNode, request: DatasetRequest) -> ImageFolder:
    """Return a split of DATA.PATH_TO_DATA_DIR, or of DATA.SOURCES, see `layouts.find_split`."""
    found = find_split(cfg, request, "image")
    images = build_image_folder(cfg, request, found.samples)
    images.describe(found)
    return images


def check_images(cfg: CfgNode) -> Iterator[str]:
    """Yield the problems of keys that `build_imagenet` reads."""
    yield from check_sources(cfg)


register(DatasetSpec(name="imagenet", media="image", build=build_imagenet, check=check_images, mixes=True))
