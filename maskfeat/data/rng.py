"""Random draws as a pure function of (seed, epoch, index, view).

No state is carried from one sample to the next, so neither the number of workers or ranks nor the step at
which a run resumes changes what a sample looks like.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import get_worker_info

VIEW_STREAM = 0
"""Draws of the augmentation of one view."""
SPAN_STREAM = 1
"""Draws that all views of a sample share: which part of a video is shown."""
MASK_STREAM = 2
"""Draws of the mask: apart, so that another augmentation leaves the masks of a run as they were."""


def sample_generator(seed: int, epoch: int, index: int, view: int, stream: int = VIEW_STREAM) -> np.random.Generator:
    """A generator that depends on these non-negative numbers and nothing else."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, index, view, stream)))


@contextlib.contextmanager
def seeded(seed: int, epoch: int, index: int, view: int) -> Iterator[np.random.Generator]:
    """Seeds the global generators of `random`, numpy and torch (CPU), and yields a generator of our own.

    timm's augmentations draw from the globals. Their former states come back on exit, so that data that is
    made in the training process (no workers) leaves the model's own draws alone. In a worker nobody else draws,
    and keeping the states would take half of the time.

    Args:
        seed, epoch, index, view: non-negative; together they name the draw.
    """
    words = np.random.SeedSequence((seed, epoch, index, view, VIEW_STREAM)).generate_state(6, np.uint32)
    alone = get_worker_info() is not None
    states = None if alone else (random.getstate(), np.random.get_state(), torch.random.get_rng_state())
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
