"""Random draws of the data as a pure function of (seed, epoch, index, view).

No state is carried from one sample to the next, so that a sample is augmented and masked alike for any number of
workers and ranks, and after resuming at any step.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

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

_GLOBAL: Any = np.random  # its type stubs lack the two functions that exchange the global generator
_LENT = np.random.MT19937(0)
"""Numpy's global generator within `seeded`, where its own is to be kept: to copy that one takes half a millisecond."""


def sample_generator(seed: int, epoch: int, index: int, view: int, stream: int = VIEW_STREAM) -> np.random.Generator:
    """Return a generator that depends on these non-negative numbers only."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, index, view, stream)))


@contextlib.contextmanager
def seeded(seed: int, epoch: int, index: int, view: int, libraries: bool = True) -> Iterator[np.random.Generator]:
    """Seed the global generators of `random`, numpy and torch (CPU), and yield a numpy generator.

    timm's augmentations draw from the global generators. Their states are restored on exit, so that loading data in the
    training process (no workers) does not change the random numbers that the model draws. In a worker they are not
    restored: nothing else draws there, and saving the states would take half of the time. Blocks are not nested. Not
    kept is the second of a pair of normal numbers that numpy's global generator has ready.

    Args:
        seed, epoch, index, view: non-negative integers.
        libraries: False where nothing is drawn from the generators of `random` and numpy, which then stay as they are:
            seeding them takes most of the time.
    """
    sequence = np.random.SeedSequence((seed, epoch, index, view, VIEW_STREAM))
    words = sequence.generate_state(6, np.uint32)
    restored = get_worker_info() is None
    state = torch.random.get_rng_state() if restored else None
    try:
        # Not torch.manual_seed, which would seed the accelerators as well.
        torch.default_generator.manual_seed(int(words[4]) << 31 | int(words[5]) >> 1)
        with _seeded_libraries(words, restored) if libraries else contextlib.nullcontext():
            yield np.random.default_rng(sequence)
    finally:
        if state is not None:
            torch.random.set_rng_state(state)


@contextlib.contextmanager
def _seeded_libraries(words: np.ndarray, restored: bool) -> Iterator[None]:
    states = (random.getstate(), _GLOBAL.get_bit_generator()) if restored else None
    try:
        if states is not None:
            _GLOBAL.set_bit_generator(_LENT)
        random.seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(words[2:4])
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            _GLOBAL.set_bit_generator(states[1])


def draw_mask(sampler: MaskSampler | None, seed: int, epoch: int, index: int, view: int) -> Tensor | None:
    """Draw the mask of one view: a bool tensor of the shape of the mask grid; None without a sampler."""
    if sampler is None:
        return None
    hidden = np.asarray(sampler(sample_generator(seed, epoch, index, view, MASK_STREAM)))
    return torch.from_numpy(np.ascontiguousarray(hidden, dtype=np.bool_))
