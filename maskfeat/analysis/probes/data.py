"""The labelled training and validation samples of a probe."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskfeat.analysis.inputs import Inputs, find_inputs
from maskfeat.analysis.probes.split import few_of_each
from maskfeat.data.datasets.layouts import holds_lists
from maskfeat.errors import UserError
from maskfeat.text import count, some

logger = logging.getLogger(__name__)

TRAIN, VAL = "train", "val"


class Splits(NamedTuple):
    """Training and validation samples, whose `numbers` count the classes of the training samples from 0.

    Attributes:
        classes: names of the classes by these numbers.
    """

    train: Inputs
    val: Inputs
    classes: list[str]


def find_splits(data: str, media: str, prefix: str = "", few: int | None = None, seed: int = 0) -> Splits:
    """Find the samples of `data`, which holds train/ and val/ with a folder for each class, or train.csv and val.csv.

    Args:
        media: "image" or "video".
        prefix: folder that the paths of lists are relative to.
        few: training samples of each class, drawn at random; None = all.
        seed: of that draw.

    Raises:
        UserError: a split is missing or has no labels, there is one class alone, or `val` has a class that `train`
            lacks.
    """
    train, val = (_split(data, name, media, prefix) for name in (TRAIN, VAL))
    present = np.unique(train.numbers)
    if len(present) < 2:
        raise UserError(f"{TRAIN} of --data {data} has one class: there is nothing to tell apart")
    number_in_val = _numbers_of_train(train, val, data)
    unknown = sorted({str(label) for label in np.setdiff1d(number_in_val, present)})
    if unknown:
        names = [_name(train, int(label)) for label in unknown]
        raise UserError(
            f"{VAL} of --data {data} has samples of {count(len(names), 'class')} ({some(names)}) of which {TRAIN} has "
            "none: both need the same classes"
        )
    absent = len(present) - len(np.unique(number_in_val))
    if absent:
        logger.info("%s has no sample of %s that %s has", VAL, count(absent, "class"), TRAIN)
    train = replace(train, numbers=np.searchsorted(present, train.numbers))
    if few:
        chosen = few_of_each(train.numbers, few, seed)
        train = replace(train, paths=[train.paths[row] for row in chosen], numbers=train.numbers[chosen])
    val = replace(val, numbers=np.searchsorted(present, number_in_val))
    return Splits(train, val, [_name(train, int(label)) for label in present])


def _split(data: str, name: str, media: str, prefix: str) -> Inputs:
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"there is no folder --data {data}: it must hold {TRAIN}/ and {VAL}/, or lists of that name")
    places = [root / name, root / f"{name}.csv"]
    if holds_lists(data, media):  # as a training of a classifier would read them
        places.reverse()
    place = next((path for path in places if path.exists()), None)
    if place is None:
        raise UserError(f"--data {data} has neither {name}/ nor {name}.csv")
    found = find_inputs(place, media, prefix)
    if not found.labelled:
        form = "files lie directly in it, or in one class folder alone" if place.is_dir() else "a line has no number"
        raise UserError(f"{place} does not say the class of every sample ({form}): a probe needs labels")
    if found.left_out:
        logger.info("%s: left out %s", place, found.left_out)
    return found


def _numbers_of_train(train: Inputs, val: Inputs, data: str) -> np.ndarray:
    """Return the classes of validation samples as the training samples number them."""
    if (train.classes is None) != (val.classes is None):
        raise UserError(f"of --data {data} one split is of class folders and the other a list: give both alike")
    if train.classes is None or val.classes is None:
        return val.numbers
    number = {name: place for place, name in enumerate(train.classes)}
    used = [val.classes[label] for label in np.unique(val.numbers)]
    unknown = [name for name in used if name not in number]
    if unknown:
        raise UserError(
            f"{VAL} of --data {data} has {count(len(unknown), 'class folder')} that {TRAIN} lacks ({some(unknown)}): "
            "both need the same names"
        )
    table = np.array([number.get(name, -1) for name in val.classes])
    return table[val.numbers]


def _name(train: Inputs, label: int) -> str:
    return str(label) if train.classes is None else train.classes[label]
