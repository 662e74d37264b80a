"""Random draws are a function of (seed, epoch, index, view) only."""

import random

import numpy as np
import pytest
import torch

from maskfeat.data.rng import MASK_STREAM, SPAN_STREAM, sample_generator, seeded

DRAWN = (0.22319746987562594, 0.029466411847525298, 0.5372437238693237, 0.5345802963976077)
"""What `draws(1, 2, 3, 4)` gave when it was written."""


def draws(*key: int) -> tuple[float, ...]:
    with seeded(*key) as rng:
        return (random.random(), float(np.random.rand()), float(torch.rand(())), float(rng.random()))


def test_same_key_same_draws_and_every_part_of_the_key_matters() -> None:
    base = draws(1, 2, 3, 4)
    assert draws(1, 2, 3, 4) == base
    seen = [
        base,
        draws(0, 2, 3, 4),
        draws(1, 0, 3, 4),
        draws(1, 2, 0, 4),
        draws(1, 2, 3, 0),
        draws(2, 1, 3, 4),
    ]
    for generator in range(4):
        assert len({values[generator] for values in seen}) == len(seen)


def test_streams_differ() -> None:
    first = {stream: sample_generator(1, 2, 3, 0, stream).random() for stream in (0, SPAN_STREAM, MASK_STREAM)}
    assert len(set(first.values())) == 3


def test_global_states_are_restored_even_after_an_error() -> None:
    def state() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = [state(), state()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    first = state()
    with pytest.raises(KeyError), seeded(0, 0, 0, 0):
        state()
        raise KeyError
    assert [first, state()] == expected


def test_large_seeds() -> None:
    assert draws(2**40 + 1, 0, 0, 0) != draws(1, 0, 0, 0)


def test_generators_of_libraries_are_left_alone_where_nothing_draws_from_them() -> None:
    with seeded(1, 2, 3, 4) as rng:
        expected = torch.rand(()), rng.random()
    random.seed(5), np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    with seeded(1, 2, 3, 4, libraries=False) as rng:
        assert (torch.rand(()), rng.random()) == expected
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_draws_do_not_change_between_versions() -> None:
    """What training sees of a sample depends on these numbers."""
    assert draws(1, 2, 3, 4) == pytest.approx(DRAWN, abs=1e-12)
