"""Features made for tests of probes."""

import numpy as np

from maskfeat.analysis.probes.features import Stored


def stored(x: np.ndarray, label: np.ndarray) -> Stored:
    """Features in memory, (N, F) or (N, V, ...), as if they had been read from the disk."""
    views = x[:, None] if x.ndim == 2 else x
    return Stored(views.astype(np.float32), label.astype(np.int64), np.arange(len(label)), {})


def blobs(number: int, distance: float, seed: int, width: int = 8, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Normal clouds around `classes` corners, with features of different scales and offsets: (N, F) and (N,)."""
    rng = np.random.default_rng(seed)
    label = rng.integers(classes, size=number)
    corners = np.random.default_rng(99).normal(size=(classes, width))
    x = distance * corners[label] + rng.normal(size=(number, width))
    return x * np.linspace(0.1, 5.0, width) + np.linspace(-20.0, 30.0, width), label
