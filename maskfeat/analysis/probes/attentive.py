"""Attentive classifiers on frozen tokens: one block of cross-attention with a learned query, then a linear layer.

V-JEPA 2 (Assran et al., 2025) evaluates frozen encoders of clips in this way.

Shape legend: B samples, T tokens, D width, H heads, K classes.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskfeat.analysis.probes.features import Stored
from maskfeat.analysis.probes.sweep import Chosen, Plan, sweep

PLAN = Plan(epochs=20, least_steps=500, batch=128, optimizer="adamw")
LRS = (3e-4, 1e-3, 3e-3)
WEIGHT_DECAYS = (0.01, 0.1, 0.4)
HEAD_WIDTH = 64


class AttentiveHead(nn.Module):
    """Cross-attention of one learned query to the tokens, an MLP and a linear layer.

    As there is one query, neither keys nor values need to be computed for each token. The score of a token x in one
    head is q . (W_k x) = (W_k^T q) . x, and the head's output is W_v times the weighted mean of tokens, so that the
    cost is that of 2 H instead of 2 D products of length D a token. The bias of the keys adds the same to all scores,
    which softmax does not see. The affine part of the LayerNorm before the attention is a part of W_k and W_v.

    Args:
        width: D.
        num_classes: K.
        mlp_ratio: width of the hidden layer of the MLP over D.
    """

    def __init__(self, width: int, num_classes: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.heads = max(width // HEAD_WIDTH, 1)
        while width % self.heads:
            self.heads -= 1
        self.query = nn.Parameter(torch.empty(width))
        self.to_query, self.to_value, self.project = (nn.Linear(width, width) for _ in range(3))
        self.to_key = nn.Linear(width, width, bias=False)
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        hidden = int(mlp_ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.linear = nn.Linear(width, num_classes)
        for parameter in self.parameters():
            if parameter.dim() == 2 or parameter is self.query:
                nn.init.trunc_normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits: tokens (B, T, D), each normalised to mean 0 and variance 1, -> (B, K)."""
        query = self.to_query(self.query).reshape(self.heads, -1)
        asked = torch.einsum("hc,hcd->hd", query, self.to_key.weight.reshape(self.heads, -1, x.shape[2]))
        attention = (x @ asked.T / math.sqrt(query.shape[1])).softmax(dim=1)  # (B, T, H)
        mean = attention.transpose(1, 2) @ x  # (B, H, D)
        value = torch.einsum("bhd,hcd->bhc", mean, self.to_value.weight.reshape(self.heads, -1, x.shape[2]))
        pooled = self.query + self.project(value.flatten(1) + self.to_value.bias)
        pooled = pooled + self.mlp(self.norm(pooled))
        out: Tensor = self.linear(self.last_norm(pooled))
        return out


def attentive_probe(
    train: Stored,
    test: Stored,
    num_classes: int,
    held: np.ndarray,
    seed: int,
    device: torch.device,
    lrs: Sequence[float] = LRS,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    plan: Plan = PLAN,
) -> Chosen:
    """Fit attentive classifiers to frozen tokens; see `sweep`.

    Args:
        train, test: tokens (T, D) of each sample and view.
        held: (M,) bool, which of `train.rows` choose.
    """
    width = train.x.shape[-1]
    return sweep(
        lambda _: AttentiveHead(width, num_classes),
        ["tokens"],
        lrs,
        weight_decays,
        plan,
        train,
        test,
        held,
        lambda x: F.layer_norm(x, (width,)),
        seed,
        device,
        "attentive probe",
    )
