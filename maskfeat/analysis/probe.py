"""Probes of frozen features: a linear classifier and nearest neighbours, on what a backbone makes of whole samples.

Shape legend: N training and M test samples, D features, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskfeat.data.loader import BatchLoader
from maskfeat.engine.parallelize import autocast
from maskfeat.models.base import Backbone

BLOCKS = 4
"""Last blocks whose features are put side by side, as Caron et al. (ICCV 2021, appendix) do for small ViTs: the very
last one is the most bent to what was predicted in pre-training."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of the weighted vote of Wu et al. (CVPR 2018), section 3.4; as many neighbours as Caron et al. (ICCV 2021)."""
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2)
"""Of the penalty on the squared weights, from which a fifth of the training samples chooses."""
_STEPS = 200


class Features(NamedTuple):
    """x (N, D) float32 and label (N,) int64, on the CPU."""

    x: Tensor
    label: Tensor


def _pooled(out: Tensor, class_tokens: int) -> Tensor:
    """What a block gives, tokens (B, N, C) or a feature map (B, C, H, W), averaged over places: (B, C) float32."""
    places = out.flatten(2).transpose(1, 2) if out.dim() == 4 else out[:, class_tokens:]
    return places.float().mean(dim=1)


@torch.no_grad()
def features(backbone: Backbone, loader: BatchLoader, device: torch.device, precision: str = "off") -> Features:
    """The means over the patch tokens of each of the last `BLOCKS` blocks, side by side, of every sample of a loader
    with nothing hidden.

    Raises:
        ValueError: a sample that cannot be read.
    """
    backbone.eval()
    rows, labels = [], []
    outs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _module, _given, out: outs.append(out))
        for block in backbone.repeated_blocks()[-BLOCKS:]
    ]
    try:
        for batch in loader:
            if batch.bad:
                raise ValueError(
                    f"{batch.bad[0].path} cannot be read ({batch.bad[0].cause}): remove it from the data set"
                )
            assert batch.label is not None
            outs.clear()
            with autocast(device, precision):
                class_tokens = int(backbone.forward_tokens(batch.clip.to(device)).has_class_token)
            rows.append(torch.cat([_pooled(out, class_tokens) for out in outs], dim=1).cpu())
            labels.append(batch.label.cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return Features(torch.cat(rows), torch.cat(labels))


def standardised(train: Features, test: Features) -> tuple[Features, Features]:
    """Both with the mean 0 and the standard deviation 1 that each feature of `train` then has.

    A feature that hardly varies keeps its small deviation: at least a thousandth of the largest one.
    """
    mean, std = train.x.mean(dim=0), train.x.std(dim=0)
    std = std.clamp(min=float(std.max()) * 1e-3 + 1e-12)
    return Features((train.x - mean) / std, train.label), Features((test.x - mean) / std, test.label)


def _fit(train: Features, num_classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of the penalised multinomial logistic regression, by L-BFGS; nothing is drawn."""
    weight = torch.zeros(num_classes, train.x.shape[1], device=train.x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=train.x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train.x, weight, bias), train.label) + strength * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _right(fit: tuple[Tensor, Tensor], test: Features) -> float:
    return 100.0 * float((F.linear(test.x, *fit).argmax(dim=1) == test.label).float().mean())


def linear_probe(train: Features, test: Features, num_classes: int, strengths: Sequence[float] = STRENGTHS) -> float:
    """Top-1 in percent of a linear classifier on standardised features.

    The strength of its penalty is the one that does best on every fifth training sample when fitted to the others; then
    it is fitted to all of them. The test samples choose nothing.
    """
    train, test = standardised(train, test)
    held = torch.arange(len(train.label)) % 5 == 0
    part, rest = Features(train.x[~held], train.label[~held]), Features(train.x[held], train.label[held])
    best = max(strengths, key=lambda strength: _right(_fit(part, num_classes, strength), rest))
    return _right(_fit(train, num_classes, best), test)


def nearest_neighbours(train: Features, test: Features, num_classes: int, k: int = NEIGHBOURS) -> float:
    """Top-1 in percent of a vote of the k nearest training samples by the cosine of standardised features, each with
    the weight exp(cosine / TEMPERATURE).
    """
    train, test = standardised(train, test)
    known, asked = F.normalize(train.x, dim=1), F.normalize(test.x, dim=1)
    right = 0
    for rows, labels in zip(asked.split(1000), test.label.split(1000), strict=True):
        cosine, nearest = (rows @ known.T).topk(min(k, len(known)), dim=1)
        votes = torch.zeros(len(rows), num_classes, device=rows.device)
        votes.scatter_add_(1, train.label[nearest], ((cosine - 1) / TEMPERATURE).exp())
        right += int((votes.argmax(dim=1) == labels).sum())
    return 100.0 * right / len(test.label)
