"""k nearest neighbours on frozen features, for several k at once.

Shape legend: B samples asked for at a time, N training samples, F features, K classes, S numbers of neighbours.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskfeat.analysis.command import Progress
from maskfeat.analysis.probes.features import Scale, Stored, chunks

KS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
"""Of the weighted vote of Wu et al. (CVPR 2018), section 3.4."""
_ASKED, _KNOWN = 1024, 65536
"""Samples whose similarities are held at a time, (asked, known): 256 MiB."""


def unit(stored: Stored, rows: np.ndarray, view: int, scale: Scale, columns: Tensor, device: torch.device) -> Tensor:
    """Return the standardised features of some samples with length 1: (B, F) float32 on `device`."""
    x = scale(torch.from_numpy(stored.take(rows, view)).to(device))[:, columns.to(device)]
    return torch.nn.functional.normalize(x, dim=1)


def votes(similarity: Tensor, label: Tensor, ks: Sequence[int], num_classes: int) -> Tensor:
    """Let the nearest neighbours vote, each with weight exp(cosine / TEMPERATURE).

    Args:
        similarity: (B, max(ks) or fewer) cosines of the neighbours, the largest first.
        label: their classes, of the same shape.
        ks: numbers of neighbours.

    Returns:
        (S, B, K) shares of the votes, each row with sum 1.
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
    scale = train.scale()
    label = torch.from_numpy(train.label[train.rows]).to(device)
    most, views = min(max(ks), len(train.rows)), asked.x.shape[1]
    out = torch.zeros(len(ks), len(asked.rows), num_classes)
    progress = Progress("views asked for their neighbours", len(asked.rows) * views)
    for part in range(0, len(asked.rows), _ASKED):
        for view in range(views):
            query = unit(asked, asked.rows[part : part + _ASKED], view, scale, columns, device)
            best = query.new_empty(len(query), 0)
            place = torch.empty(len(query), 0, dtype=torch.int64, device=device)
            start = 0
            for rows in chunks(train.rows, _KNOWN):
                known = unit(train, rows, 0, scale, columns, device)
                best = torch.cat([best, query @ known.T], dim=1)
                place = torch.cat(
                    [place, torch.arange(start, start + len(rows), device=device).expand(len(query), -1)], 1
                )
                best, order = best.topk(min(most, best.shape[1]), dim=1)
                place, start = place.gather(1, order), start + len(rows)
            out[:, part : part + _ASKED] += votes(best, label[place], ks, num_classes).cpu() / views
            progress.step(len(query))
    return out
