"""What simple predictors reach on held-out samples, to judge the loss of a pre-trained model by.

MaskFeat: zero, the mean HOG, the mean HOG of each position, and a ridge regression from the HOG of visible neighbours.
MFM: zero, the mean image, and a ridge regression from the visible frequencies. All are fitted to training samples with
their crops and masks, and measured like the model: on the same samples, masks and terms.

Shape legend: B samples, N tokens in a grid ([T,] H, W), F values per token, K neighbours; n hidden tokens of a batch.
"""

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.batch import Batch
from maskfeat.build import build_loader, build_objective
from maskfeat.checkpoint.files import open_checkpoint
from maskfeat.checkpoint.reading import model_state
from maskfeat.distributed.world import choose_device
from maskfeat.errors import UserError
from maskfeat.objectives.base import Objective
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.objectives.mfm import MFM

logger = logging.getLogger(__name__)

ZERO, MEAN, PLACE, RIDGE, MODEL = "zero", "mean", "mean_by_place", "ridge", "model"

REACH = 2
"""Neighbours of a token: all whose distance in frames plus that in rows or columns, the larger, is at most this."""
_MEAN_BATCHES = 40
"""Number of training batches over which means are computed."""
_MOST_TOKENS = 50_000
"""Number of hidden tokens that the regression of MaskFeat is fitted to, at most."""
_MOST_VALUES = 64_000_000
"""Number of values of all images that the regression of MFM is fitted to, at most, for either kind of filter."""
_MOST_IMAGES = 2000
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Candidate strengths of the penalty, in units of the mean variance of an input; the best on a fifth of the training
batches is used."""
_STRENGTHS_OF_IMAGES = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
"""The same for MFM, in units of the mean product of an image with itself. Up to the number of images, near which the
regression finds the mean image alone: images have more pixels than there are images."""
_HELD = 5


@torch.no_grad()
def references(objective: Objective, cfg: CfgNode, device: torch.device) -> dict[str, float]:
    """Return the held-out loss of a pre-trained model and of simple predictors.

    Args:
        objective: MaskFeat or MFM, on `device`; left in evaluation mode.
        cfg: its config, which names the data.

    Returns:
        losses by name: `ZERO`, `PLACE`, `RIDGE`, `MODEL`, and of MaskFeat `MEAN`.

    Raises:
        UserError: the objective is another one, or there is too little data to fit a regression.
    """
    objective.eval()
    train = build_loader(cfg, "train", device=device)
    train.set_epoch(0)
    held_out = build_loader(cfg, "val", device=device)
    if isinstance(objective, MaskFeat):
        return _of_hog(objective, train, held_out, device)
    if isinstance(objective, MFM):
        return _of_spectra(objective, train, held_out, device)
    raise UserError(f"there are references for MaskFeat and MFM, not for {type(objective).__name__}")


def references_of(checkpoint: str | Path, cfg: CfgNode) -> dict[str, float]:
    """Return the `references` of a checkpoint of pre-training, on the device of its config."""
    objective, device = build_objective(cfg), choose_device(cfg.NUM_GPUS, 0)
    objective.load_released_state(model_state(open_checkpoint(checkpoint)))
    return references(objective.to(device), cfg, device)


def share(losses: dict[str, float]) -> float:
    """Return how much of what the ridge regression explains beyond the mean by place the model explains: 1 = as much.

    NaN where the regression explains less than 2 % of the loss of the mean by place: next to nothing.
    """
    explained = losses[PLACE] - losses[RIDGE]
    return (losses[PLACE] - losses[MODEL]) / explained if explained >= 0.02 * losses[PLACE] else math.nan


# ---------------------------------------------------------------------- MaskFeat


def neighbours(grid: Sequence[int], reach: int = REACH) -> Tensor:
    """Return the neighbours of each token: (N, K) int64, N where one would be outside of the grid.

    Args:
        grid: ([T,] H, W).
    """
    frames, rows, columns = (1, *grid)[-3:]
    steps = range(-reach, reach + 1)
    offsets = torch.tensor(
        [
            step
            for step in itertools.product(steps if frames > 1 else (0,), steps, steps)
            if 0 < abs(step[0]) + max(abs(step[1]), abs(step[2])) <= reach
        ]
    )
    size = torch.tensor([frames, rows, columns])
    places = torch.cartesian_prod(*(torch.arange(int(one)) for one in size)).unsqueeze(1) + offsets
    inside = ((places >= 0) & (places < size)).all(dim=2)
    index = (places[..., 0] * rows + places[..., 1]) * columns + places[..., 2]
    return torch.where(inside, index, frames * rows * columns)


class _Moments:
    """Second moments of inputs (K F) and outputs (F) that grow by batches, in float64."""

    def __init__(self) -> None:
        self.inputs: Tensor | float = 0.0
        self.both: Tensor | float = 0.0
        self.outputs = 0.0
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add inputs (n, K F) and outputs (n, F)."""
        x, y = x.double(), y.double()  # in float32 the weakest penalties would drown in rounding
        self.inputs = self.inputs + x.T @ x
        self.both = self.both + x.T @ y
        self.outputs += float(y.square().sum())
        self.count += len(x)

    def solve(self, strength: float) -> Tensor:
        """Return the weights (K F, F) of the ridge regression."""
        assert isinstance(self.inputs, Tensor) and isinstance(self.both, Tensor)
        penalty = strength * self.inputs.diagonal().mean()
        matrix = self.inputs + penalty * torch.eye(len(self.inputs), dtype=torch.float64, device=self.inputs.device)
        return torch.cholesky_solve(self.both, torch.linalg.cholesky(matrix))

    def error(self, weights: Tensor) -> float:
        """Return the sum of squared errors of weights."""
        assert isinstance(self.inputs, Tensor) and isinstance(self.both, Tensor)
        explained = 2 * (weights * self.both).sum() - (weights * (self.inputs @ weights)).sum()
        return self.outputs - float(explained)

    def joined(self, other: "_Moments") -> "_Moments":
        both = _Moments()
        both.inputs, both.both = self.inputs + other.inputs, self.both + other.both
        both.outputs, both.count = self.outputs + other.outputs, self.count + other.count
        return both


class _Neighbourhood:
    """The inputs of the regression of MaskFeat: the deviations of visible neighbours from the mean of their position.

    Args:
        objective: MaskFeat.
        mean: (N, F) float32, of each position.
    """

    def __init__(self, objective: MaskFeat, mean: Tensor) -> None:
        self.objective, self.mean = objective, mean
        self.near = neighbours(objective.backbone.grid).to(mean.device)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs (n, K F), the deviations to predict (n, F), and the positions (n,) of hidden tokens.

        A neighbour that is hidden or outside counts as the mean.
        """
        hidden = self.objective.hidden_tokens(batch)
        deviation = self.objective.target(batch.clip) - self.mean
        seen = torch.cat([deviation.masked_fill(hidden.unsqueeze(-1), 0.0), torch.zeros_like(deviation[:, :1])], dim=1)
        sample, place = hidden.nonzero().unbind(1)
        return seen[sample.unsqueeze(1), self.near[place]].flatten(1), deviation[sample, place], place


def _of_hog(
    objective: MaskFeat, train: Iterable[Batch], held_out: Iterable[Batch], device: torch.device
) -> dict[str, float]:
    total, count = torch.zeros((), device=device), 0
    for batch in itertools.islice(train, _MEAN_BATCHES):
        target = objective.target(batch.clip.to(device))
        total, count = total + target.sum(dim=0), count + len(target)
    mean = total / count
    read = _Neighbourhood(objective, mean)
    weights = _fit(read, train, device)
    sums = dict.fromkeys((ZERO, MEAN, PLACE, RIDGE, MODEL), 0.0)
    terms = 0
    overall = mean.mean(dim=0)
    for batch in held_out:
        batch = batch.to(device)
        prediction, target = objective.predict_hidden(batch)
        x, deviation, place = read(batch)
        guesses = {
            ZERO: torch.zeros_like(target),
            MEAN: overall.expand_as(target),
            PLACE: target - deviation,
            RIDGE: mean[place] + x @ weights,
            MODEL: prediction.float(),
        }
        for name, guess in guesses.items():
            sums[name] += float((guess - target).double().square().sum())
        terms += target.numel()
    return {name: value / terms for name, value in sums.items()}


def _fit(read: _Neighbourhood, train: Iterable[Batch], device: torch.device) -> Tensor:
    """Return the weights (K F, F) float32 of the regression, fitted to a pass over the training set at most."""
    fitted, held = _Moments(), _Moments()
    for number, batch in enumerate(train):
        x, deviation, _ = read(batch.to(device))
        (held if number % _HELD == _HELD - 1 else fitted).add(x, deviation)
        if fitted.count + held.count >= _MOST_TOKENS:
            break
    if not fitted.count or not held.count:
        raise UserError(f"a ridge regression from visible neighbours needs at least {_HELD} training batches")
    best = min(_STRENGTHS, key=lambda strength: held.error(fitted.solve(strength)))
    logger.debug("ridge regression on %d tokens, strength %g", fitted.count + held.count, best)
    return fitted.joined(held).solve(best).float()


# ---------------------------------------------------------------------- MFM


class _Kernel:
    """A ridge regression from images with frequencies removed to whole images, by the products of images.

    Both filter and transform are linear, so that this is the regression from visible frequencies to removed ones; what
    it says of the others is not measured.

    Args:
        x: (n, P) float32, filtered images of the training set.
        y: (n, Q) float32, their target images.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.mean_x, self.mean_y = x.mean(dim=0), y.mean(dim=0)
        self.x, self.y = x - self.mean_x, y - self.mean_y
        self.products = (self.x @ self.x.T).double()
        self.weights: Tensor | None = None

    def fit(self, strength: float) -> None:
        penalty = strength * self.products.diagonal().mean()
        matrix = self.products + penalty * torch.eye(len(self.x), dtype=torch.float64, device=self.x.device)
        self.weights = torch.cholesky_solve(self.y.double(), torch.linalg.cholesky(matrix)).float()

    def __call__(self, x: Tensor) -> Tensor:
        assert self.weights is not None
        return self.mean_y + ((x - self.mean_x) @ self.x.T) @ self.weights


def _kinds(batch: Batch) -> Tensor:
    """Return (B,) bool: True = the low frequencies of an image are removed, False = the high ones."""
    assert batch.hidden is not None
    if batch.hidden.shape[1:] != (1, 1):
        raise UserError("references of MFM are for discs of frequencies, as the loader samples them")
    return batch.hidden[:, 0, 0]


def _spectral_loss(objective: MFM, batch: Batch, prediction: Tensor) -> float:
    """Return the loss of predicted images (B, C, H, W), times its weight in the mean over batches."""
    removed, _, target = objective.inputs(batch)
    loss = objective.loss(prediction, target, removed, removed.count().clamp(min=1))
    return float(loss) * float(objective.weight(batch))


def _of_spectra(
    objective: MFM, train: Iterable[Batch], held_out: Iterable[Batch], device: torch.device
) -> dict[str, float]:
    fitted, tuned, mean = _images(objective, train, device)
    kernels = {kind: _Kernel(*(torch.cat(part) for part in zip(*pairs, strict=True))) for kind, pairs in fitted.items()}

    def predicted(batch: Batch) -> Tensor:
        _, seen, target = objective.inputs(batch)
        out = torch.zeros_like(target)
        for kind, kernel in kernels.items():
            rows = _kinds(batch) == kind
            if rows.any():
                out[rows] = kernel(seen[rows].flatten(1)).view_as(target[rows])
        return out

    tried = {}
    for strength in _STRENGTHS_OF_IMAGES:
        for kernel in kernels.values():
            kernel.fit(strength)
        tried[strength] = sum(_spectral_loss(objective, batch, predicted(batch)) for batch in tuned)
    for kernel in kernels.values():
        kernel.fit(min(tried, key=tried.__getitem__))
    sums = dict.fromkeys((ZERO, PLACE, RIDGE, MODEL), 0.0)
    terms = 0.0
    for batch in held_out:
        batch = objective.prepare(batch.to(device))
        _, seen, target = objective.inputs(batch)
        guesses = {
            ZERO: torch.zeros_like(target),
            PLACE: mean.expand_as(target),
            RIDGE: predicted(batch),
            MODEL: objective.predict_image(seen).float(),
        }
        for name, guess in guesses.items():
            sums[name] += _spectral_loss(objective, batch, guess)
        terms += float(objective.weight(batch))
    return {name: value / terms for name, value in sums.items()}


def _images(
    objective: MFM, train: Iterable[Batch], device: torch.device
) -> tuple[dict[bool, list[tuple[Tensor, Tensor]]], list[Batch], Tensor]:
    """Return filtered images and targets by kind of filter, batches that choose the penalty, and the mean target."""
    fitted: dict[bool, list[tuple[Tensor, Tensor]]] = {}
    tuned: list[Batch] = []
    most = min(_MOST_IMAGES, _MOST_VALUES // (3 * math.prod(objective.backbone.clip_size)))
    total, count = torch.zeros((), device=device), 0
    for number, batch in enumerate(train):
        batch = objective.prepare(batch.to(device))
        _, seen, target = objective.inputs(batch)
        total, count = total + target.sum(dim=0), count + len(target)
        if number % _HELD == _HELD - 1:
            tuned.append(batch)
            continue
        kinds = _kinds(batch)
        for kind in (False, True):
            if (kinds == kind).any():
                pair = seen[kinds == kind].flatten(1), target[kinds == kind].flatten(1)
                fitted.setdefault(kind, []).append(pair)
        if count >= 2 * most:
            break
    if not fitted or not tuned:
        raise UserError(f"a ridge regression from visible frequencies needs at least {_HELD} training batches")
    return fitted, tuned, total / count
