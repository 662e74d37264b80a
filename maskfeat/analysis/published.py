"""Published weights by name: where they are, which recipe made them, and which accuracy their authors report."""

from typing import Any, NamedTuple

from torchvision.models import ResNet50_Weights, WeightsEnum
from yacs.config import CfgNode

from maskfeat.checkpoint.download import fetch
from maskfeat.config import load_config
from maskfeat.errors import UserError


class Published(NamedTuple):
    """A published file.

    Attributes:
        name: for `load_model`.
        address: of the file.
        recipe: which network it is: a recipe below configs/.
        about: what it is.
        accuracy: as its authors report it.
        keys: of the config, where they differ from the recipe.
        size: in bytes; None = not known, see `checkpoint.download.fetch`.
        sha256: in hexadecimal, or its first digits; "" = not known.
    """

    name: str
    address: str
    recipe: str
    about: str
    accuracy: str
    keys: tuple[Any, ...] = ()
    size: int | None = None
    sha256: str = ""

    def config(self) -> CfgNode:
        """Return the config of the network."""
        return load_config(self.recipe, self.keys)

    def path(self) -> str:
        """Return the path of the file in the cache, fetching it if it is not there.

        Raises:
            UserError: it cannot be fetched; names the address.
        """
        try:
            return str(fetch(self.address, self.size, self.sha256))
        except UserError as error:
            raise UserError(
                f"{self.name}: {error}. Where there is no network, fetch {self.address} elsewhere and give its path"
            ) from error


_MASKFEAT = "https://dl.fbaipublicfiles.com/pyslowfast/masked_models/"
_MFM = "https://github.com/CoinCheung/MFM/releases/download/0.0.0/"
_TORCHVISION = {1: ResNet50_Weights.IMAGENET1K_V1, 2: ResNet50_Weights.IMAGENET1K_V2}


def _maskfeat(name: str, file: str, recipe: str, about: str, accuracy: str) -> Published:
    return Published(
        f"maskfeat_{name}", _MASKFEAT + file, f"masked_ssl/{recipe}", about, f"{accuracy} after fine-tuning"
    )


def shown_by(weights: WeightsEnum) -> dict[str, Any]:
    """Return the keys with which images are shown as torchvision shows them to a network with these weights."""
    shown = weights.transforms()
    return {
        "DATA.MEAN": shown.mean,
        "DATA.STD": shown.std,
        "DATA.TRAIN_CROP_SIZE": shown.crop_size[0],
        "DATA.TEST_CROP_SIZE": shown.crop_size[0],
        "DATA.TEST_SHORT_SIDE": shown.resize_size[0],
        "DATA.TEST_INTERPOLATION": str(shown.interpolation.value),
    }


def _torchvision(version: int) -> Published:
    """Return torchvision's ResNet-50, whose table gives the address, the transforms and, in the name, the hash."""
    weights = _TORCHVISION[version]
    keys = shown_by(weights)
    return Published(
        f"torchvision_resnet50_v{version}",
        weights.url,
        "mfm/in1k_R50_SUP_FT",
        f"ResNet-50, supervised on ImageNet-1K ({weights})",
        f"{weights.meta['_metrics']['ImageNet-1K']['acc@1']} % top-1",
        keys=tuple(part for pair in keys.items() for part in pair),
        sha256=weights.url.rpartition("-")[2].removesuffix(".pth"),
    )


_TABLE = (
    _maskfeat(
        "vit_base_in1k",
        "in1k_VIT_B_MaskFeat_PT_epoch_01600.pyth",
        "in1k_VIT_B_MaskFeat_PT",
        "ViT-B/16, MaskFeat on ImageNet-1K for 1600 epochs",
        "84.0 % top-1",
    ),
    _maskfeat(
        "vit_large_in1k",
        "in1k_VIT_L_MaskFeat_PT_epoch_01600.pyth",
        "in1k_VIT_L_MaskFeat_PT",
        "ViT-L/16, MaskFeat on ImageNet-1K for 1600 epochs",
        "85.7 % top-1",
    ),
    _maskfeat(
        "mvitv2_small_k400",
        "k400_MVIT_S_MaskFeat_PT_epoch_00300.pyth",
        "k400_MVITv2_S_16x4_MaskFeat_PT",
        "MViTv2-S 16x4, MaskFeat on Kinetics-400 for 300 epochs",
        "82.2 % top-1, 10 views",
    ),
    _maskfeat(
        "mvitv2_large_k400",
        "k400_MVIT_L_MaskFeat_PT_epoch_00800.pyth",
        "k400_MVITv2_L_16x4_MaskFeat_PT",
        "MViTv2-L 16x4, MaskFeat on Kinetics-400 for 800 epochs",
        "84.3 % top-1, 10 views",
    ),
    Published(
        "mfm_resnet50_in1k",
        f"{_MFM}saved_model_15.pth",
        "mfm/in1k_R50_MFM_PT",
        "ResNet-50, MFM on ImageNet-1K for 300 epochs",
        "78.83 % top-1 after fine-tuning",
    ),
    Published(
        "mfm_resnet50_in1k_ft",
        f"{_MFM}saved_model_bce_15.pth",
        "mfm/in1k_R50_MFM_FT",
        "the same, fine-tuned on ImageNet-1K for 100 epochs",
        "78.83 % top-1",
    ),
    Published(
        "mfm_resnet50_in1k_supervised_ft",
        f"{_MFM}saved_model_bce_0_pretrain.pth",
        "mfm/in1k_R50_SUP_FT",
        "torchvision's ResNet-50, fine-tuned likewise",
        "78.94 % top-1",
    ),
    _torchvision(1),
    _torchvision(2),
)
PUBLISHED = {entry.name: entry for entry in _TABLE}


def list_models() -> list[Published]:
    """Return the published files that `load_model` knows by name."""
    return list(PUBLISHED.values())


def imagenet_classes() -> list[str]:
    """Return the names of ImageNet-1K's classes, in the order of their folders."""
    return list(_TORCHVISION[1].meta["categories"])
