"""Linear classifiers on standardised frozen features: features, learning rates and weight decays swept at once.

Shape legend: B samples, F features, K classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from maskfeat.analysis.probes.features import Stored
from maskfeat.analysis.probes.sweep import Chosen, Plan, sweep

PLAN = Plan(epochs=10, least_steps=500, batch=256, optimizer="sgd")
LRS = (0.01, 0.03, 0.1)
WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Factors of half the sum of squared weights beside the mean cross-entropy. A few samples of a class want about 0.1."""


class LinearHead(nn.Module):
    """A linear layer on some of the features; its weights start at 0.

    Args:
        columns: (F',) int64, the features it reads.
        num_classes: K.
    """

    columns: Tensor

    def __init__(self, columns: Tensor, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.linear = nn.Linear(len(columns), num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits: (B, F) -> (B, K)."""
        out: Tensor = self.linear(x[:, self.columns])
        return out


def linear_probe(
    train: Stored,
    test: Stored,
    columns: Mapping[str, Tensor],
    num_classes: int,
    held: np.ndarray,
    seed: int,
    device: torch.device,
    lrs: Sequence[float] = LRS,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    plan: Plan = PLAN,
) -> Chosen:
    """Fit linear classifiers to features that are standardised by the training samples; see `sweep`.

    Args:
        columns: the features to choose from: name -> (F',) int64.
        held: (M,) bool, which of `train.rows` choose.
    """
    scale = train.scale()
    return sweep(
        lambda name: LinearHead(columns[name], num_classes),
        list(columns),
        lrs,
        weight_decays,
        plan,
        train,
        test,
        held,
        lambda x: scale(x),
        seed,
        device,
        "linear probe",
    )
