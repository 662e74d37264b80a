"""Epochs of several sources with weights: which samples they draw and how often, as the epoch alone decides."""

from collections import Counter

import numpy as np
import pytest

from maskfeat.batch import SampleKey
from maskfeat.data.samplers import EpochSampler, shares

MIXTURE = [(10, 1.0), (50, 1.0), (30, 4.0)]
STARTS = [0, 10, 60, 90]


def sampler(batch: int = 9, **options: object) -> EpochSampler:
    return EpochSampler(90, batch, seed=3, mixture=MIXTURE, **options)  # type: ignore[arg-type]


def keys(sampler: EpochSampler, epoch: int, start: int = 0) -> list[SampleKey]:
    sampler.set_epoch(epoch)
    sampler.set_start(start)
    return [key for batch in sampler for key in batch]


def by_source(found: list[SampleKey], source: int) -> list[int]:
    return [key.index - STARTS[source] for key in found if STARTS[source] <= key.index < STARTS[source + 1]]


def test_shares_add_up() -> None:
    assert shares(MIXTURE, 90) == [15, 15, 60]
    assert shares([(5, 1), (5, 1), (5, 1)], 100) == [34, 33, 33]
    assert shares([(5, 1e-3), (5, 1)], 10) == [0, 10]
    random = np.random.default_rng(0)
    for _ in range(50):
        weights = random.uniform(0.01, 5, random.integers(1, 9)).tolist()
        found = shares([(3, weight) for weight in weights], 1000)
        assert sum(found) == 1000
        assert np.abs(np.array(found) - 1000 * np.array(weights) / sum(weights)).max() < 1


def test_every_sample_of_a_source_is_drawn_before_one_is_repeated() -> None:
    """Also over the ends of epochs: the counts within a source never differ by more than one."""
    one = sampler()
    drawn: list[list[int]] = [[], [], []]
    for epoch in range(7):
        found = keys(one, epoch)
        assert len(found) == 90
        for source, expected in enumerate((15, 15, 60)):
            assert len(by_source(found, source)) == expected
            drawn[source] += by_source(found, source)
            counts = Counter(drawn[source])
            often = [counts[index] for index in range(MIXTURE[source][0])]
            assert max(often) - min(often) <= 1, (epoch, source)
    assert len(set(drawn[1])) == 50, "15 of 50 an epoch: all have been seen"


def test_epochs_differ_and_their_sources_are_mixed() -> None:
    one = sampler()
    first, second = keys(one, 0), keys(one, 1)
    assert [key.index for key in first] != [key.index for key in second]
    place = [np.searchsorted(STARTS, key.index, "right") for key in first]
    assert len(set(place[:20])) == 3, "not one source after another"


def test_a_sample_that_is_shown_twice_in_an_epoch_has_another_key() -> None:
    one = sampler()
    seen = [key for epoch in range(5) for key in keys(one, epoch)]
    assert len(set(seen)) == len(seen), "its draws, a function of the key, are never repeated in a run"


def test_the_order_does_not_depend_on_processes_or_on_where_it_starts() -> None:
    whole = keys(sampler(), 4)
    assert keys(sampler(), 4) == whole
    assert keys(sampler(), 4, start=3) == whole[27:]
    split = [sampler(batch=3, rank=rank, world_size=3) for rank in range(3)]
    for one in split:
        one.set_epoch(4)
    assert [key for step in zip(*split, strict=True) for batch in step for key in batch] == whole


def test_repeated_augmentation_draws_fewer_samples() -> None:
    found = keys(sampler(repeats=2), 0)
    assert len(found) == 90 and len({key[:2] for key in found}) == 45
    assert [key.view for key in found] == [0, 1] * 45
    assert [len(by_source(found, source)) for source in range(3)] == [16, 14, 60]
    assert len(set(found)) == 90


def test_every_round_of_a_source_has_an_order_of_its_own() -> None:
    """A source whose rounds of 20 last two epochs: the ten that the first of both draws differ from round to round."""
    one = EpochSampler(40, 4, seed=1, mixture=[(20, 1.0), (20, 3.0)])
    drawn = [frozenset(key.index for key in keys(one, epoch) if key.index < 20) for epoch in range(8)]
    assert all(
        len(first) == 10 and len(first | second) == 20 for first, second in zip(drawn[::2], drawn[1::2], strict=True)
    )
    assert len(set(drawn[::2])) == 4


@pytest.mark.parametrize("epoch", [0, 5])
def test_one_source_alone_is_gone_through_once_an_epoch(epoch: int) -> None:
    one = EpochSampler(20, 5, seed=1, mixture=[(20, 0.5)])
    one.set_epoch(epoch)
    assert sorted(key.index for batch in one for key in batch) == list(range(20))
