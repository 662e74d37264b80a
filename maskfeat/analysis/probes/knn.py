"""k nearest neighbours on frozen features, for several k at once.

Shape legend: B samples asked for at a time, N training samples, F features, K classes, S numbers of neighbours.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskfeat.analysis.probes.features import Scale, Stored, chunks
from maskfeat.progress import Progress

KS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
"""Of the weighted vote of Wu et al. (CVPR 2018), section 3.4."""
_ASKED, _KNOWN = 1024, 32768
"""Samples whose similarities are held at a time, (asked, known): 128 MiB."""


def unit(stored: Stored, rows: np.ndarray, view: int, scale: Scale, columns: Tensor, device: torch.device) -> Tensor:
    """Return the standardised features of some samples with length 1: (B, F) float32 on `device`."""
    x = scale(torch.from_numpy(stored.take(rows, view)).to(device))[:, columns.to(device)]
    return torch.nn.functional.normalize(x, dim=1)


def votes(similarity: Tensor, label: Tensor, ks: Sequence[int], num_classes: int) -> Tensor:
    """Let the nearest neighbours vote, each with weight exp(cosine / TEMPERATURE).

    Args:
        similarity: (B, max(ks) or fewer) float cosines of the neighbours, the largest first.
        label: their classes, int64 of the same shape.
        ks: numbers of neighbours.

    Returns:
        (S, B, K) shares of the votes, of the dtype of `similarity`, each row with sum 1.
    """
    weight = ((similarity - similarity[:, :1]) / TEMPERATURE).exp()
    shares = []
    for k in ks:
        found = weight.new_zeros(len(weight), num_classes).scatter_add_(1, label[:, :k], weight[:, :k])
        shares.append(found / found.sum(dim=1, keepdim=True))
    return torch.stack(shares)


@torch.no_grad()
def neighbour_shares(
    train: Stored,
    asked: Stored,
    columns: Tensor,
    ks: Sequence[int],
    num_classes: int,
    device: torch.device,
) -> Tensor:
    """Return the votes of the nearest training samples for each sample asked for, averaged over its views.

    Features are standardised by the mean and the standard deviation of the training samples: what all of them have in
    common would make every cosine large.

    Args:
        train: the known samples; their first view is used.
        asked: the samples to classify.
        columns: (F',) int64, the features to use.
        ks: numbers of neighbours; where there are fewer training samples, all of them vote.

    Returns:
        (S, M, K) float32, on the CPU, in the order of `asked.rows`.
    """
    scale, views = train.scale(), asked.x.shape[1]
    most = min(max(ks), len(train.rows))
    # The nearest so far. Each part of the training samples is read once, and compared with all that are asked for.
    best = torch.full((views, len(asked.rows), most), -torch.inf)
    label = torch.zeros(best.shape, dtype=torch.int64)
    progress = Progress("comparisons with training samples", len(train.rows) * len(asked.rows) * views)
    for rows in chunks(train.rows, _KNOWN):
        known = unit(train, rows, 0, scale, columns, device)
        label_known = torch.from_numpy(train.label[rows]).to(device)
        for start in range(0, len(asked.rows), _ASKED):
            part = slice(start, start + _ASKED)
            for view in range(views):
                query = unit(asked, asked.rows[part], view, scale, columns, device)
                similarity = torch.cat([best[view, part].to(device), query @ known.T], dim=1)
                labels = torch.cat([label[view, part].to(device), label_known.expand(len(query), -1)], dim=1)
                similarity, order = similarity.topk(most, dim=1)
                best[view, part], label[view, part] = similarity.cpu(), labels.gather(1, order).cpu()
                progress.step(len(query) * len(rows))
    shares = [votes(best[view], label[view], ks, num_classes) for view in range(views)]
    return torch.stack(shares).mean(dim=0)
