"""Nearest neighbours of frozen features: against the definition written out in float64."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from samples import blobs, stored

from maskfeat.analysis.probes import knn
from maskfeat.analysis.probes.features import Stored
from maskfeat.analysis.probes.knn import KS, TEMPERATURE, neighbour_shares, votes

CPU = torch.device("cpu")


def shares(train: Stored, asked: Stored, ks: tuple[int, ...] = KS, classes: int = 4) -> torch.Tensor:
    return neighbour_shares(train, asked, torch.arange(train.x.shape[-1]), ks, classes, CPU)


def by_hand(train: Stored, asked: Stored, k: int, classes: int) -> np.ndarray:
    """One sample and one view after the other, float64."""
    known = train.x[train.rows, 0].astype(np.float64)
    mean, std = known.mean(axis=0), known.std(axis=0, ddof=1)
    known = (known - mean) / std
    labels = train.label[train.rows].tolist()
    out = np.zeros((len(asked.rows), classes))
    for number, row in enumerate(asked.rows):
        for view in range(asked.x.shape[1]):
            query = (asked.x[row, view].astype(np.float64) - mean) / std
            cosines = [
                (float(query @ other) / math.sqrt(float(query @ query) * float(other @ other)), label)
                for other, label in zip(known, labels, strict=True)
            ]
            found = np.zeros(classes)
            for cosine, label in sorted(cosines, reverse=True)[:k]:
                found[label] += math.exp(cosine / TEMPERATURE)
            out[number] += found / found.sum() / asked.x.shape[1]
    return out


@pytest.mark.parametrize("distance", [0.4, 0.8])
def test_every_k_votes_as_the_definition_says(distance: float) -> None:
    train, test = stored(*blobs(90, distance, 0)), stored(*blobs(60, distance, 1))
    found = shares(train, test)
    assert found.shape == (len(KS), 60, 4)
    for k, share in zip(KS, found, strict=True):
        np.testing.assert_allclose(share.numpy(), by_hand(train, test, k, 4), atol=2e-5)
    assert len({tuple(share.argmax(dim=1).tolist()) for share in found}) > 1, "k matters here"


def test_votes_of_views_are_averaged() -> None:
    train = stored(*blobs(50, 0.6, 0))
    parts = [blobs(30, 0.6, seed)[0] for seed in (1, 2, 3)]
    test = stored(np.stack(parts, axis=1), np.zeros(30))
    found = shares(train, test, (7,))
    np.testing.assert_allclose(found[0].numpy(), by_hand(train, test, 7, 4), atol=2e-5)
    alone = [shares(train, stored(part, np.zeros(30)), (7,)) for part in parts]
    torch.testing.assert_close(found, sum(alone) / 3)
    assert not torch.allclose(alone[0], alone[1])


def test_parts_of_the_samples_change_nothing() -> None:
    train, test = stored(*blobs(205, 0.5, 0)), stored(*blobs(33, 0.5, 1))
    whole = shares(train, test)
    with mock.patch.object(knn, "_ASKED", 10), mock.patch.object(knn, "_KNOWN", 20):
        torch.testing.assert_close(shares(train, test), whole)


def test_samples_that_are_left_out_are_not_asked_and_do_not_vote() -> None:
    x, label = blobs(80, 0.5, 0)
    rows = np.setdiff1d(np.arange(80), [0, 7, 30])
    train = stored(x, label).among(rows)
    x[[0, 7, 30]] = np.nan
    damaged = stored(x, label).among(rows)
    test = stored(*blobs(20, 0.5, 1))
    torch.testing.assert_close(shares(damaged, test), shares(train, test))
    np.testing.assert_allclose(shares(train, test, (9,))[0].numpy(), by_hand(train, test, 9, 4), atol=2e-5)


def test_some_of_the_features() -> None:
    (x, label), (y, other) = blobs(60, 0.5, 0), blobs(25, 0.5, 1)
    columns = torch.tensor([1, 4, 5])
    found = neighbour_shares(stored(x, label), stored(y, other), columns, (5,), 4, CPU)
    torch.testing.assert_close(found, shares(stored(x[:, [1, 4, 5]], label), stored(y[:, [1, 4, 5]], other), (5,)))


def test_similar_cosines_do_not_overflow() -> None:
    share = votes(torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[2, 2, 0]]), (1, 3), 3)
    assert share.tolist()[0] == [[0.0, 0.0, 1.0]]
    assert share[1, 0, 2] == pytest.approx(1.0) and share.sum(dim=2).flatten().tolist() == pytest.approx([1.0, 1.0])
