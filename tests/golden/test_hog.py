"""HOG against the published layer."""

from pathlib import Path

import numpy as np
import pytest
import torch

from maskfeat.objectives.hog import hog

GOLDEN = np.load(Path(__file__).with_name("hog.npz"))


@pytest.mark.parametrize("name", ["noise", "smooth", "edge"])
def test_published_features(name: str) -> None:
    features = hog(torch.from_numpy(GOLDEN[name]))
    np.testing.assert_allclose(features.numpy(), GOLDEN[f"{name}_hog"], atol=1e-6, rtol=0)
