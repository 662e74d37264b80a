"""How the fine-tuning recipes of ResNet-50 resize: bicubic in the crop, in RandAugment and in the test."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment

from maskfeat.batch import SampleKey
from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.data.datasets.imagenet import ImageFolder
from maskfeat.data.transforms import ImageTrainTransform
from tests.small import MFM_RECIPES, R50_FT, images

RECIPES = ["in1k_R50_MFM_FT", "in1k_R50_SUP_FT", "in1k_R50_scratch_FT"]


def _dataset(recipe: str, split: str, root: Path) -> ImageFolder:
    dataset = build_loader(load_config(MFM_RECIPES / f"{recipe}.yaml", [*R50_FT, *images(root)]), split).dataset
    assert isinstance(dataset, ImageFolder)
    return dataset


@pytest.mark.parametrize("recipe", RECIPES)
def test_training(recipe: str, image_data: Path) -> None:
    transform = _dataset(recipe, "train", image_data).transform
    assert isinstance(transform, ImageTrainTransform) and transform.mode == Image.Resampling.BICUBIC
    assert isinstance(transform.augment, RandAugment)
    assert transform.augment.interpolation == InterpolationMode.BICUBIC


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation(recipe: str, split: str, image_data: Path) -> None:
    dataset = _dataset(recipe, split, image_data)
    (sample,) = dataset[SampleKey(0, 0)]
    with Image.open(dataset.path(0)) as image:
        resized, bilinear = (
            np.asarray(image.convert("RGB").resize((44, 44), mode))[2:42, 2:42]
            for mode in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
        )
    assert np.array_equal(sample.pixels, resized) and not np.array_equal(resized, bilinear)
