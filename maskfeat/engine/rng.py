"""Seeding of the global random generators, once per step."""

import random

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices) by a key such as (seed, step, rank).

    Called at every step, so that a resumed run draws what an uninterrupted one draws.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
