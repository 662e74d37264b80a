"""Frozen features of a split, memory-mapped: computed once, in a folder where an interrupted extraction goes on.

Shape legend: N samples, V views, B samples of a batch, T tokens, D token width, F features.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskfeat.analysis.inputs import InputBatch
from maskfeat.engine.owner import owned
from maskfeat.errors import UserError, naming
from maskfeat.file_io import replace_text
from maskfeat.progress import Progress

logger = logging.getLogger(__name__)

_CHUNK = 4096
_SAVE_EVERY = 20
"""Batches after which what is done is written to the disk: an interruption costs at most these."""


class Stored(NamedTuple):
    """Features of a split on the disk.

    Attributes:
        x: (N, V, *shape) float32 or float16, memory-mapped.
        label: (N,) int64.
        rows: (M,) int64, the samples that could be read, ascending.
        bad: {index: path and cause} of the others.
    """

    x: np.ndarray
    label: np.ndarray
    rows: np.ndarray
    bad: dict[int, str]

    def take(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """Return the features of some samples, (B, *shape) float32, in the order of `rows`, (B,) int64."""
        order = np.argsort(rows, kind="stable")  # ascending, as a disk reads best
        out = np.empty((len(rows), *self.x.shape[2:]), dtype=np.float32)
        out[order] = self.x[rows[order], view]
        return out

    def among(self, rows: np.ndarray) -> "Stored":
        """Return the same features with fewer samples: `rows`, (M,) int64, ascending."""
        return self._replace(rows=rows)

    def scale(self) -> "Scale":
        """Return mean and standard deviation of each feature over the samples and their first view."""
        shape = self.x.shape[2:]
        total, square = np.zeros(shape), np.zeros(shape)
        # Sums of differences from one sample: those of squares alone would cancel where means are large.
        origin = self.take(self.rows[:1])[0].astype(np.float64)
        for start in range(0, len(self.rows), _CHUNK):
            x = self.take(self.rows[start : start + _CHUNK]) - origin
            total += x.sum(axis=0)
            square += np.square(x).sum(axis=0)
        count = len(self.rows)
        std = np.sqrt(np.maximum(square - total * total / count, 0) / max(count - 1, 1))
        floor = max(float(std.max()) * 1e-3, 1e-12)
        return Scale(torch.from_numpy(total / count + origin).float(), torch.from_numpy(np.maximum(std, floor)).float())


class Scale(NamedTuple):
    """Mean and standard deviation of each feature, (F,) float32.

    A standard deviation of less than a thousandth of the largest one is replaced by that, so that features that hardly
    vary are not amplified.
    """

    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise features (B, F)."""
        return (x - self.mean.to(x.device)) / self.std.to(x.device)


def _check_room(folder: Path, size: int, shape: tuple[int, ...]) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"features of shape {' x '.join(map(str, shape))} take {size / 2**30:.1f} GiB and {folder} has "
            f"{free / 2**30:.1f} GiB left: name another folder (--features), or take fewer samples (--few) or views"
        )


def extract(
    folder: Path,
    split: str,
    asked: dict[str, Any],
    label: np.ndarray,
    views: int,
    shape: tuple[int, ...],
    dtype: str,
    batches: Callable[[range], Iterable[InputBatch]],
    batch_size: int,
    features: Callable[[Tensor], Tensor],
) -> Stored:
    """Return the features of a split, from `folder` where they are there, computed otherwise.

    Args:
        folder: of `<split>.npy` and `<split>.json`, which says how many batches are in it.
        split: its name.
        asked: what the features depend on; a folder with something else is refused.
        label: (N,) int64.
        views: V of each sample.
        shape, dtype: of the features of a view.
        batches: numbers of batches -> these batches, of all views in order.
        batch_size: views of a batch.
        features: clips (B, 3, [T,] H, W) -> (B, *shape).

    Raises:
        UserError: the folder holds other features or another command writes to it, the disk is too small, features
            overflow `dtype`, or no sample can be read.
    """
    record, path = folder / f"{split}.json", folder / f"{split}.npy"
    total = len(label) * views
    steps = -(-total // batch_size)
    with owned(folder, "--features"), naming(f"features cannot be written to {folder}"):
        x, done, bad = _opened(path, record, asked, (len(label), views, *shape), dtype)

        def save(done: int) -> None:
            x.flush()
            replace_text(record, json.dumps({"asked": asked, "done": done, "bad": bad}))

        save(done)
        progress = Progress(f"views of {split}", total - done * batch_size)
        for number, batch in enumerate(batches(range(done, steps)) if done < steps else (), start=done + 1):
            found = features(batch.clip).float().cpu()
            _check_finite(found, dtype, split)
            x[batch.index.numpy(), batch.view.numpy()] = found.numpy()
            bad.update({str(one.index): f"{one.path} ({one.cause})" for one in batch.unreadable})
            if number % _SAVE_EVERY == 0 or number == steps:
                save(number)
            progress.step(len(batch.index))
    lost = {int(index): cause for index, cause in bad.items()}
    return Stored(np.load(path, mmap_mode="r"), label, _readable(len(label), lost, split), lost)


def _opened(
    path: Path, record: Path, asked: dict[str, Any], whole: tuple[int, ...], dtype: str
) -> tuple[np.memmap[Any, Any], int, dict[str, str]]:
    """Open the features to be written, which are made where there are none.

    Returns:
        the features, how many batches of them are done, and the samples that could not be read.
    """
    done, bad = _continue(record, asked)
    if not record.is_file() or not path.is_file():
        _check_room(path.parent, math.prod(whole) * np.dtype(dtype).itemsize, whole)
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=whole).flush()
        done, bad = 0, {}
    x = np.lib.format.open_memmap(path, mode="r+")
    assert x.shape == whole and x.dtype == np.dtype(dtype)
    return x, done, bad


def _readable(samples: int, lost: dict[int, str], split: str) -> np.ndarray:
    """Return the samples that could be read; UserError where there are none."""
    for cause in lost.values():
        logger.warning("left out of %s: %s", split, cause)
    rows = np.setdiff1d(np.arange(samples), list(lost))
    if not len(rows):
        raise UserError(f"none of the {samples} samples of {split} can be read; the first: {next(iter(lost.values()))}")
    return rows


def _continue(record: Path, asked: dict[str, Any]) -> tuple[int, dict[str, str]]:
    """Return the number of batches that are done, and the samples that could not be read."""
    if not record.is_file():
        return 0, {}
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        given, done, bad = found["asked"], int(found["done"]), dict(found["bad"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} cannot be read ({error}): remove {record.parent}") from error
    if given != json.loads(json.dumps(asked)):
        changed = [key for key in asked if given.get(key) != json.loads(json.dumps(asked[key]))]
        raise UserError(
            f"{record.parent} has features of something else ({', '.join(changed)} changed): give another folder, or "
            "remove it"
        )
    return done, bad


def _check_finite(x: Tensor, dtype: str, split: str) -> None:
    limit = float(np.finfo(np.dtype(dtype)).max)
    if not bool((x.abs() <= limit).all()):  # of NaN, too
        raise UserError(
            f"features of {split} are NaN, infinite or above {limit:.5g}, the largest number of {np.dtype(dtype)}: the "
            "weights are broken, or --precision fp16 overflows"
        )


def chunks(rows: np.ndarray, size: int = _CHUNK) -> Iterator[np.ndarray]:
    """Yield the rows, (M,) int64, in parts of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
