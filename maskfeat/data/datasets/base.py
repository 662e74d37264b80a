"""What a data set is asked for, and what image and video data sets share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from yacs.config import CfgNode

from maskfeat.errors import UserError
from maskfeat.masking import MaskSampler


class NoValidation(UserError):
    """There is no validation set where pre-training looks for one; it goes on without."""


@dataclass(frozen=True)
class DatasetRequest:
    """What the `build` of a `DatasetSpec` receives beside the config.

    Attributes:
        split: "train", "val" or "test".
        augmented: whether samples are augmented, and unreadable ones replaced. False for the split "train" shows its
            samples as "val" does.
        draw_hidden: samples the mask of a view; None = no masks.
        num_clips: clips of each video in testing; None = TEST.NUM_ENSEMBLE_VIEWS.
        classes: names that number the classes, such as those that a checkpoint was trained on; None = those of the
            training set. A data set whose samples carry numbers does not need them.
    """

    split: str
    augmented: bool
    draw_hidden: MaskSampler | None = None
    num_clips: int | None = None
    classes: Sequence[str] | None = None


class Split(NamedTuple):
    """The samples of a split.

    Attributes:
        samples: [(path, class number)]; NO_LABEL where there are no classes; with DATA.MULTI_LABEL [(path, numbers)].
        place, left_out: where they are and what else is there, in words.
        classes: their names by their numbers; None = they have none.
        mixture: (samples, weight) of each of DATA.SOURCES.
    """

    samples: Sequence[tuple[str, Any]]
    place: str
    left_out: str = ""
    classes: list[str] | None = None
    mixture: Sequence[tuple[int, float]] = ()


def augmentation(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments that image and clip transforms share in training; AUG.ENABLE False leaves crop and flip."""
    aug, data = cfg.AUG, cfg.DATA
    on = aug.ENABLE
    return {
        "crop": data.TRAIN_CROP_SIZE,
        "mean": data.MEAN,
        "std": data.STD,
        "flip": data.RANDOM_FLIP,
        "auto_augment": aug.AA_TYPE if on else "",
        "interpolation": aug.INTERPOLATION,
        "erase_prob": aug.RE_PROB if on else 0.0,
        "erase_mode": aug.RE_MODE,
        "erase_count": aug.RE_COUNT,
    }


def num_views(cfg: CfgNode, request: DatasetRequest) -> int:
    """Return the number of augmented views of each sample in a batch."""
    return int(cfg.AUG.NUM_SAMPLE) if request.augmented and cfg.AUG.ENABLE else 1
