"""Probes of small sets, in memory: logistic regression to its optimum, and k nearest neighbours, without random draws.

Shape legend: N training and M test samples, D features, K classes.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskfeat.analysis.probes.features import Stored
from maskfeat.analysis.probes.knn import neighbour_shares
from maskfeat.data.loader import BatchLoader
from maskfeat.engine.parallelize import autocast
from maskfeat.errors import UserError
from maskfeat.models.base import Backbone

BLOCKS = 4
"""Number of last blocks whose features are concatenated, as Caron et al. (ICCV 2021, appendix) do for small ViTs. The
very last block is the most specialised to the pre-training target."""
NEIGHBOURS = 20
"""k, as in Caron et al. (ICCV 2021)."""
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2)
"""Candidate strengths of the L2 penalty; the best on a fifth of the training samples is used."""
_STEPS = 200


class Features(NamedTuple):
    """Features of samples and their labels: x (N, D) float32 and label (N,) int64, on the CPU."""

    x: Tensor
    label: Tensor


def _pooled(out: Tensor, class_tokens: int) -> Tensor:
    """Average the output of a block, tokens (B, N, C) or a feature map (B, C, H, W), over positions: (B, C) float32."""
    positions = out.flatten(2).transpose(1, 2) if out.dim() == 4 else out[:, class_tokens:]
    return positions.float().mean(dim=1)


@torch.no_grad()
def features(backbone: Backbone, loader: BatchLoader, device: torch.device, precision: str = "off") -> Features:
    """Return the features of every sample of a loader.

    They are the patch tokens of each of the last `BLOCKS` blocks, averaged and concatenated. Nothing is hidden.

    Args:
        backbone: on `device`; left in evaluation mode.
        loader: of labelled samples.
        device: where features are computed.
        precision: "off", "bf16" or "fp16".

    Raises:
        UserError: a sample cannot be read.
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
                raise UserError(
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


def _stored(given: Features) -> Stored:
    return Stored(given.x[:, None].numpy(), given.label.numpy(), np.arange(len(given.label)), {})


def standardised(train: Features, test: Features) -> tuple[Features, Features]:
    """Standardise both by the mean and standard deviation of each feature of `train`, see `Scale`."""
    scale = _stored(train).scale()
    return train._replace(x=scale(train.x)), test._replace(x=scale(test.x))


def regression_type() -> type[Any]:
    """Return scikit-learn's `LogisticRegression`.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("probes need scikit-learn, which is not installed: pip install '.[probes]'") from error
    return LogisticRegression


def _fit(train: Features, strength: float) -> Any:
    """Fit a multinomial logistic regression by L-BFGS: mean cross-entropy + strength x sum of squared weights.

    scikit-learn minimises C x sum of cross-entropies + half the sum of squared weights. For two classes it holds one
    weight vector, the difference of both, whose square is twice the sum of their squares.
    """
    halves = 1 if len(train.label.unique()) == 2 else 2
    classifier = regression_type()(C=1 / (halves * strength * len(train.label)), max_iter=_STEPS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lbfgs failed to converge")  # weak penalties take more steps and gain nothing
        return classifier.fit(train.x.numpy(), train.label.numpy())


def _top1(classifier: Any, test: Features) -> float:
    return 100.0 * float(classifier.score(test.x.numpy(), test.label.numpy()))


def linear_probe(train: Features, test: Features, strengths: Sequence[float] = STRENGTHS) -> float:
    """Return the top-1 accuracy, in percent, of a linear classifier on standardised features.

    The strength of the penalty is the one with the best accuracy on every fifth training sample when fitted to the
    others; the classifier is then fitted to all training samples. Test samples are used for the final accuracy alone.

    Raises:
        UserError: scikit-learn is not installed.
    """
    train, test = standardised(train, test)
    held = torch.arange(len(train.label)) % 5 == 0
    part, rest = Features(train.x[~held], train.label[~held]), Features(train.x[held], train.label[held])
    best = max(strengths, key=lambda strength: _top1(_fit(part, strength), rest))
    return _top1(_fit(train, best), test)


def nearest_neighbours(train: Features, test: Features, k: int = NEIGHBOURS) -> float:
    """Return the top-1 accuracy, in percent, of a weighted kNN classifier on standardised features.

    The k training samples with the largest cosine similarity vote, see `neighbour_shares`.
    """
    classes = int(torch.cat([train.label, test.label]).max()) + 1
    columns = torch.arange(train.x.shape[1])
    (shares,) = neighbour_shares(_stored(train), _stored(test), columns, (k,), classes, torch.device("cpu"))
    return 100.0 * float((shares.argmax(dim=1) == test.label).float().mean())
