"""Validation and multi-view testing.

Shape legend: B samples (views), V videos or images, K classes.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from maskfeat.batch import Batch
from maskfeat.data.loader import BatchLoader
from maskfeat.distributed.collectives import all_gather_object, all_reduce_sum_on_cpu, run_on_main
from maskfeat.engine import multi_label
from maskfeat.engine.metrics_log import MetricWindow
from maskfeat.engine.parallelize import autocast
from maskfeat.errors import NotFinite
from maskfeat.objectives.base import Objective
from maskfeat.progress import Progress

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 30.0
# Blocks are compiled for the one batch shape of training: other shapes would recompile them.
_uncompiled = torch.compiler.set_stance("force_eager")


def _unreadable(batch: Batch) -> Tensor:
    """Return (B,) bool: rows whose sample could not be read. They hold zeros and must count as wrong."""
    assert batch.index is not None
    bad = torch.tensor([b.index for b in batch.bad], dtype=torch.int64, device=batch.index.device)
    return torch.isin(batch.index, bad)


def _describe(what: str, indices: Sequence[int], loader: BatchLoader, precision: str) -> str:
    """Say for how many samples the result is not finite, and which file is the first of them."""
    overflow = (
        "; numbers above 65504 overflow in fp16: TEST.MIXED_PRECISION bf16 or False" if precision == "fp16" else ""
    )
    return (
        f"{what} of {len(indices)} of {len(loader.labels)} samples are not finite (NaN or infinite), the first is "
        f"sample {min(indices)}, {loader.dataset.path(min(indices))}{overflow}"
    )


Heartbeat = Callable[[str], None]
"""Receives the status at every step; it may raise `Preempted`."""


@torch.no_grad()
@_uncompiled
def validate(
    objective: Objective,
    loader: BatchLoader,
    device: torch.device,
    precision: str,
    heartbeat: Heartbeat = lambda _: None,
) -> dict[str, float]:
    """Evaluate an objective on a validation set.

    Scores or losses that are not finite are reported as an error in the log, and training can go on.

    Returns:
        for a classifier "top1" and "top5" in percent (a sample that is unreadable, or whose scores are not finite,
        counts as wrong), "mAP" where a sample may have several classes (it then has the lowest scores); otherwise the
        means of the loss and of the objective's metrics.
    """
    objective.eval()
    window = MetricWindow()
    finite: list[Tensor] = []
    shown: list[Tensor] = []
    several: list[tuple[Tensor, Tensor]] = []  # scores and targets where a sample may have several classes
    progress = Progress("steps of validation", len(loader), _REPORT_SECONDS)
    for step, batch in enumerate(loader):
        batch = batch.to(device, non_blocking=True)
        with autocast(device, precision):
            if objective.classifies:
                assert batch.label is not None
                scores = objective.predict(batch)
                finite.append(scores.isfinite().all(dim=1))
                good = finite[-1] & ~_unreadable(batch)
                if batch.label.is_floating_point():
                    several.append((scores.float().masked_fill(~good[:, None], 0.0), batch.label))
                else:
                    right = in_top(scores, batch.label, (1, 5))
                    weight = torch.tensor(float(len(batch)), device=device)
                    window.add(weight, {name: 100.0 * (hit & good).float().mean() for name, hit in right.items()})
            else:
                out = objective(batch)
                finite.append(out.loss.isfinite().expand(len(batch)))
                window.add(objective.weight(batch), {"loss": out.loss, **out.metrics})
        assert batch.index is not None
        shown.append(batch.index)
        progress.step()
        heartbeat(f"validation, step {step + 1}")
    mine = torch.cat(shown)[~torch.cat(finite)].tolist() if shown else []
    of_ranks = all_gather_object((mine, bool(several)))
    broken = sorted({index for indices, _ in of_ranks for index in indices})
    if broken:
        text = _describe("scores" if objective.classifies else "losses of the batches", broken, loader, precision)
        run_on_main(lambda: logger.error("NOT FINITE in validation: %s", text))
    found = window.read(uneven=True)
    if any(has_several for _, has_several in of_ranks):  # said by all ranks, as one may have had no batch
        gathered = all_gather_object([torch.cat(parts).cpu() for parts in zip(*several, strict=True)])
        scores, targets = (torch.cat(parts) for parts in zip(*filter(None, gathered), strict=True))
        found["mAP"] = multi_label.mean_average_precision(scores, targets)
    return found


def in_top(scores: Tensor, label: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Return {"top1": (B,) bool, ...}: whether the label is among the k highest of scores (B, K); k is at most K."""
    best = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices
    return {f"top{k}": (best[:, :k] == label[:, None]).any(dim=1) for k in ks}


@torch.no_grad()
@_uncompiled
def multi_view_test(
    objective: Objective,
    loader: BatchLoader,
    labels: Sequence[int] | Sequence[tuple[int, ...]],
    device: torch.device,
    precision: str,
    heartbeat: Heartbeat = lambda _: None,
) -> tuple[dict[str, float], str]:
    """Test with every view of every video or image; probabilities are summed over views.

    Args:
        loader: yields each (index, view) once over all ranks.
        labels: V class indices, by index; or V tuples of them, where a sample may have several.

    Returns:
        "top1" and "top5" in percent of all V, where unreadable ones count as wrong, or "mAP", where they have the
        lowest scores; "unreadable", their number; and as JSON text the same, with label, predictions and whether it was
        read for each index.

    Raises:
        NotFinite: scores are NaN or infinite, on every rank.
    """
    objective.eval()
    scores: Tensor | None = None
    unreadable = torch.zeros(len(labels), device=device)
    progress = Progress("steps of testing", len(loader), _REPORT_SECONDS)
    for step, batch in enumerate(loader):
        batch = batch.to(device, non_blocking=True)
        assert batch.index is not None
        with autocast(device, precision):
            probabilities = objective.predict(batch).float()
        if scores is None:
            scores = torch.zeros(len(labels), probabilities.shape[1], device=device)
        bad = _unreadable(batch)
        scores.index_add_(0, batch.index, probabilities.masked_fill(bad[:, None], 0.0))
        unreadable.index_add_(0, batch.index, bad.float())
        progress.step()
        heartbeat(f"testing, step {step + 1}")
    if scores is None:  # no batch was left for this rank
        scores = torch.zeros(len(labels), objective.num_classes, device=device)
    scores, unreadable = all_reduce_sum_on_cpu(scores), all_reduce_sum_on_cpu(unreadable)
    broken = (~scores.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise NotFinite(f"{_describe('scores', broken, loader, precision)}: the test has no result")
    readable = unreadable == 0
    sets = [label for label in labels if isinstance(label, tuple)]
    if sets:
        return multi_label.results(sets, scores, readable)
    truth = torch.as_tensor(labels)
    hits = in_top(scores, truth, (1, 5))
    result = {name: 100.0 * float((hit & readable).float().mean()) for name, hit in hits.items()}
    result["unreadable"] = int((~readable).sum())
    return result, _results(result, truth, scores, readable)


def _results(result: Mapping[str, float], truth: Tensor, scores: Tensor, readable: Tensor) -> str:
    """Return as JSON the accuracies, and for every index its label, the top five classes and whether it was read."""
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices.tolist()
    rows = [
        {"index": i, "label": label, "predicted": top, "read": read}
        for i, (label, top, read) in enumerate(zip(truth.tolist(), best, readable.tolist(), strict=True))
    ]
    return json.dumps({**result, "samples": rows}, indent=1)
