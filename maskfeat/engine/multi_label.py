"""What is measured where a sample may have several classes: average precision of each class, and its mean (mAP).

Shape legend: N samples, K classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskfeat.data.datasets.label_sets import multi_hot
from maskfeat.engine.confusion import all_names, csv_text
from maskfeat.errors import naming
from maskfeat.file_io import replace_bytes


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the average precision of each class: the mean over its samples of the precision at their score.

    Samples of one score have one rank, the last of them, as in scikit-learn.

    Args:
        scores: (N, K) float, finite.
        truth: (N, K), not 0 where a sample has the class.

    Returns:
        (K,) float64, 0 to 1; NaN for classes without a sample.
    """
    found = []
    for score, has in zip(scores.T.numpy(), truth.T.numpy() != 0, strict=True):
        order = np.argsort(-score, kind="stable")
        ranked, right = -score[order], has[order]
        last = np.searchsorted(ranked, ranked[right], side="right")  # samples with that score or a higher one
        found.append((np.cumsum(right)[last - 1] / last).mean() if right.any() else np.nan)
    return torch.tensor(found, dtype=torch.float64)


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Return the mean of `average_precision` over the classes that have a sample, in percent; NaN if none has one.

    Args:
        scores: (N, K) float, finite, on the CPU.
        truth: (N, K), on the CPU, not 0 where a sample has the class.
    """
    return 100.0 * float(average_precision(scores, truth).nanmean())


def results(labels: Sequence[tuple[int, ...]], scores: Tensor, readable: Tensor) -> tuple[dict[str, float], str]:
    """Return what a test found, and as JSON text also the average precision of each class and the five best classes of
    each sample.

    Args:
        labels: N tuples of class indices.
        scores: (N, K) float32; 0 for samples that could not be read.
        readable: (N,) bool.

    Returns:
        "mAP" in percent and "unreadable", the number of samples; JSON text.
    """
    each = average_precision(scores, multi_hot(labels, scores.shape[1]))
    found = {"mAP": 100.0 * float(each.nanmean()), "unreadable": int((~readable).sum())}
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices.tolist()
    rows = [
        {"index": index, "label": list(label), "predicted": top, "read": read}
        for index, (label, top, read) in enumerate(zip(labels, best, readable.tolist(), strict=True))
    ]
    percent = [None if np.isnan(value) else 100.0 * value for value in each.tolist()]
    return found, json.dumps({**found, "average_precision": percent, "samples": rows}, indent=1)


def write_class_precision(folder: str, what: str, details: str, names: Sequence[str] | None) -> str:
    """Write test_classes_WHAT.csv into a folder: a line for each class with its samples and its average precision.

    Args:
        folder: OUTPUT_DIR.
        what: was tested: the views, and `_ema` for averaged weights.
        details: JSON text of `results`.
        names: of the first classes by their numbers.

    Returns:
        a line that says what was written.

    Raises:
        UserFileError: it cannot be written.
    """
    content = json.loads(details)
    percent = content["average_precision"]
    samples = np.bincount([k for row in content["samples"] for k in row["label"]], minlength=len(percent))
    lines = [
        [number, name, samples[number], "" if value is None else f"{value:.2f}"]
        for number, (name, value) in enumerate(zip(all_names(len(percent), names), percent, strict=True))
    ]
    path = Path(folder) / f"test_classes_{what}.csv"
    text = csv_text([("number", "class", "samples", "average_precision"), *lines])
    with naming(f"{path} cannot be written; the scores are in the log"):
        replace_bytes(path, text.encode("utf-8", "surrogateescape"))  # as folders may be named
    return f"average precision of each class: {path.name} in {folder}"
