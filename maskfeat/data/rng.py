"""Random draws of the data as a pure function of (seed, epoch, index, view).

No state is carried from one sample to the next, so that a sample is augmented and masked alike for any number of
workers and ranks, and after resuming at any step.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from maskfeat.masking import MaskSampler

VIEW_STREAM = 0
"""Stream of the augmentation of one view."""
SPAN_STREAM = 1
"""Stream of the temporal sampling, which all views of a video share."""
MASK_STREAM = 2
"""Stream of the mask: separate, so that changing the augmentation does not change the masks."""


def sample_generator(seed: int, epoch: int, index: int, view: int, stream: int = VIEW_STREAM) -> np.random.Generator:
    """Return a generator that depends on these non-negative numbers only."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, index, view, stream)))


@contextlib.contextmanager
def seeded(seed: int, epoch: int, index: int, view: int) -> Iterator[np.random.Generator]:
    """Seed the global generators of `random`, numpy and torch (CPU), and yield a numpy generator.

    timm's augmentations draw from the global generators. Their states are restored on exit, so that loading data in the
    training process (no workers) does not change the random numbers that the model draws. In a worker they are not
    restored: nothing else draws there, and saving the states would take half of the time.

    Args:
        seed, epoch, index, view: non-negative integers.
    """
    words = np.random.SeedSequence((seed, epoch, index, view, VIEW_STREAM)).generate_state(6, np.uint32)
    in_worker = get_worker_info() is not None
    states = None if in_worker else (random.getstate(), np.random.get_state(), torch.random.get_rng_state())
    try:
        random.seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(words[2:4])
        # Not torch.manual_seed, which would seed the accelerators as well.
        torch.default_generator.manual_seed(int(words[4]) << 31 | int(words[5]) >> 1)
        yield sample_generator(seed, epoch, index, view)
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.random.set_rng_state(states[2])


def draw_mask(sampler: MaskSampler | None, seed: int, epoch: int, index: int, view: int) -> Tensor | None:
    """Draw the mask of one view: a bool tensor of the shape of the mask grid; None without a sampler."""
    if sampler is None:
        return None
    hidden = np.asarray(sampler(sample_generator(seed, epoch, index, view, MASK_STREAM)))
    return torch.from_numpy(np.ascontiguousarray(hidden, dtype=np.bool_))
