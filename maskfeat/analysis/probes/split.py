"""The part of the training samples that chooses between settings, so that test samples decide nothing."""

import logging

import numpy as np

from maskfeat.errors import UserError

logger = logging.getLogger(__name__)

SHARE = 0.2
"""Share of each class that is held out."""


def held_out(label: np.ndarray, seed: int) -> np.ndarray:
    """Choose the samples that are held out: of each class a fifth, rounded, drawn at random. A warning counts classes
    that have none to spare.

    Args:
        label: (N,) int64, of the training samples.
        seed: of the draw.

    Returns:
        (N,) bool

    Raises:
        UserError: no class has the three samples of which one can be spared.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(label), dtype=bool)
    for number in np.unique(label):
        members = np.flatnonzero(label == number)
        held[rng.permutation(members)[: int(len(members) * SHARE + 0.5)]] = True
    if not held.any():
        raise UserError(
            "no class has 3 training samples or more: a fifth of each class is held out to choose between settings; "
            "give more samples (--few)"
        )
    classes, asked = len(np.unique(label)), len(np.unique(label[held]))
    if asked < classes:
        logger.warning(
            "%d of %d classes have fewer than 3 training samples and none to hold out: settings are chosen on %d of "
            "the others",
            classes - asked,
            classes,
            held.sum(),
        )
    return held


def few_of_each(label: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Choose `number` samples of each class (all where there are fewer) at random: (M,) int64, ascending."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(label == one))[:number] for one in np.unique(label)]
    return np.sort(np.concatenate(chosen))
