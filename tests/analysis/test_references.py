"""References of held-out losses, against plain computations in float64."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from maskfeat.analysis.references import neighbours, references, share
from maskfeat.build import build_loader, build_objective
from maskfeat.config import load_config
from maskfeat.errors import UserError
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.objectives.mfm import MFM
from tests.small import MFM_PT, MFM_RECIPES, MVIT_PT, RECIPES, VIT_FT, VIT_PT, clips, images

Float = NDArray[np.float64]
STRENGTHS, STRENGTHS_OF_IMAGES = (1e-4, 1e-3, 1e-2, 1e-1), (1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
FEW_BINS = ["MASK.HOG_BINS", "2"]
HOG_OF_IMAGES = (
    RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml",
    [*VIT_PT, *FEW_BINS, "DATA.TRAIN_CROP_SIZE", "48", "DATA.TEST_CROP_SIZE", "48"],
)
HOG_OF_CLIPS = (RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", [*MVIT_PT, *FEW_BINS, "TRAIN.BATCH_SIZE", "2"])


def ridge(x: Float, y: Float, strength: float) -> Float:
    penalty = strength * np.square(x).sum(axis=0).mean()
    solved: Float = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    return solved


def rows(objective: MaskFeat, batch: object, mean: Float) -> tuple[Float, Float, list[int]]:
    """Inputs, deviations and positions of hidden tokens, one after the other."""
    grid = (1, *objective.backbone.grid)[-3:]
    target = objective.target(batch.clip).double().numpy()  # type: ignore[attr-defined]
    hidden = objective.hidden_tokens(batch).numpy()  # type: ignore[arg-type]
    inputs, outputs, places = [], [], []
    for sample in range(len(target)):
        for place in np.flatnonzero(hidden[sample]):
            t, y, x = np.unravel_index(place, grid)
            row = []
            for dt in range(-2, 3) if grid[0] > 1 else (0,):
                for dy in range(-2, 3):
                    for dx in range(-2, 3):
                        if not 0 < abs(dt) + max(abs(dy), abs(dx)) <= 2:
                            continue
                        near = (t + dt, y + dy, x + dx)
                        value = np.zeros(target.shape[-1])
                        if all(0 <= one < size for one, size in zip(near, grid, strict=True)):
                            index = np.ravel_multi_index(near, grid)
                            if not hidden[sample, index]:
                                value = target[sample, index] - mean[index]
                        row.append(value)
            inputs.append(np.concatenate(row))
            outputs.append(target[sample, place] - mean[place])
            places.append(int(place))
    return np.array(inputs), np.array(outputs), places


@pytest.mark.slow
@pytest.mark.parametrize("media", ["images", "clips"])
def test_hog(media: str, image_data: Path, clip_data: Path) -> None:
    recipe, opts = HOG_OF_IMAGES if media == "images" else HOG_OF_CLIPS
    cfg = load_config(recipe, [*opts, *(images(image_data) if media == "images" else clips(clip_data))])
    torch.manual_seed(0)
    objective = build_objective(cfg).eval()
    assert isinstance(objective, MaskFeat)
    found = references(objective, cfg, torch.device("cpu"))
    train = build_loader(cfg, "train")
    train.set_epoch(0)
    batches = list(train)
    assert len(batches) >= 5
    mean = torch.cat([objective.target(batch.clip) for batch in batches]).double().mean(dim=0).numpy()
    parts = [rows(objective, batch, mean) for batch in batches]
    fitted, held = (
        [np.concatenate([part[i] for number, part in enumerate(parts) if (number % 5 == 4) == last]) for i in (0, 1)]
        for last in (False, True)
    )
    costs = [np.square(held[0] @ ridge(*fitted, strength) - held[1]).sum() for strength in STRENGTHS]
    both = (np.concatenate([fitted[0], held[0]]), np.concatenate([fitted[1], held[1]]))
    weights = ridge(*both, STRENGTHS[int(np.argmin(costs))])
    sums, terms = dict.fromkeys(found, 0.0), 0
    for batch in build_loader(cfg, "val"):
        x, deviation, places = rows(objective, batch, mean)
        target = deviation + mean[places]
        prediction, _ = objective.predict_hidden(batch)
        guesses = {
            "zero": 0.0,
            "mean": mean.mean(axis=0),
            "mean_by_place": mean[places],
            "ridge": mean[places] + x @ weights,
            "model": prediction.detach().double().numpy(),
        }
        for name, guess in guesses.items():
            sums[name] += float(np.square(guess - target).sum())
        terms += target.size
    for name, value in sums.items():
        assert found[name] == pytest.approx(value / terms, rel=1e-3), name
    assert min(abs(found["ridge"] - found[name]) for name in ("zero", "mean", "mean_by_place")) > 1e-4


@pytest.mark.slow
def test_spectra(image_data: Path) -> None:
    """The regression from the products of images equals that from pixels to pixels; losses are those of the method."""
    opts = [*MFM_PT, "DATA.TRAIN_CROP_SIZE", "32", *images(image_data)]
    cfg = load_config(MFM_RECIPES / "in1k_R50_MFM_PT.yaml", opts)
    torch.manual_seed(0)
    objective = build_objective(cfg).eval()
    assert isinstance(objective, MFM)
    found = references(objective, cfg, torch.device("cpu"))
    train = build_loader(cfg, "train")
    train.set_epoch(0)
    batches = list(train)
    fitted = [batch for number, batch in enumerate(batches) if number % 5 != 4]
    mean = torch.cat([objective.target(batch.clip) for batch in batches]).mean(dim=0)

    def pairs(kind: bool) -> tuple[torch.Tensor, torch.Tensor]:
        xs, ys = [], []
        for batch in fitted:
            assert batch.hidden is not None
            _, seen, target = objective.inputs(batch)
            chosen = batch.hidden[:, 0, 0] == kind
            xs.append(seen[chosen].flatten(1).double())
            ys.append(target[chosen].flatten(1).double())
        return torch.cat(xs), torch.cat(ys)

    @functools.cache
    def predictor(strength: float, kind: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y = pairs(kind)
        mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
        x, y = x - mean_x, y - mean_y
        penalty = strength * x.square().sum(dim=1).mean()
        return mean_x, mean_y, torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)

    def loss(batch: object, guess: torch.Tensor) -> float:
        removed, _, target = objective.inputs(batch)  # type: ignore[arg-type]
        return float(objective.loss(guess, target, removed, removed.count())) * len(target)

    def regression(batch: object, strength: float) -> torch.Tensor:
        _, seen, target = objective.inputs(batch)  # type: ignore[arg-type]
        out = torch.zeros_like(target)
        for kind in (False, True):
            mean_x, mean_y, weights = predictor(strength, kind)
            chosen = batch.hidden[:, 0, 0] == kind  # type: ignore[attr-defined]
            out[chosen] = (
                (mean_y + (seen[chosen].flatten(1).double() - mean_x) @ weights).float().view_as(target[chosen])
            )
        return out

    best = min(STRENGTHS_OF_IMAGES, key=lambda strength: loss(batches[4], regression(batches[4], strength)))
    val = list(build_loader(cfg, "val"))
    count = sum(len(batch) for batch in val)
    wanted = {
        "mean_by_place": sum(loss(batch, mean.expand(len(batch), -1, -1, -1)) for batch in val),
        "ridge": sum(loss(batch, regression(batch, best)) for batch in val),
        "model": sum(float(objective(batch).loss.detach()) * len(batch) for batch in val),
        "zero": sum(float(objective(batch).metrics["zero_predictor"]) * len(batch) for batch in val),
    }
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value / count, rel=1e-3), name
    assert found["ridge"] < 1.01 * found["mean_by_place"], "a regression may find nothing, and is then the mean"


def test_neighbours_of_images_and_clips() -> None:
    near = neighbours((3, 4))
    assert near.shape == (12, 24)
    assert sorted(set(near[0].tolist())) == [1, 2, 4, 5, 6, 8, 9, 10, 12], "12 stands for what is outside"
    near = neighbours((4, 3, 3))
    assert near.shape == (36, 24 + 2 * 8 + 2 * 1 + 2)
    middle = set(near[1 * 9 + 4].tolist())
    assert {0 * 9 + 4, 2 * 9 + 4, 3 * 9 + 4} <= middle and 0 * 9 + 0 in middle and 3 * 9 + 3 not in middle
    assert 1 * 9 + 4 not in middle


def test_share_of_what_a_regression_finds() -> None:
    losses = {"mean_by_place": 0.05, "ridge": 0.04, "model": 0.045}
    assert share(losses) == pytest.approx(0.5)
    assert share({**losses, "model": 0.03}) == pytest.approx(2.0)
    assert math.isnan(share({**losses, "ridge": 0.05}))
    assert math.isnan(share({**losses, "ridge": 0.985 * losses["mean_by_place"]})), "next to nothing"


def test_what_has_no_references(image_data: Path) -> None:
    cfg = load_config(RECIPES / "in1k_VIT_B_FT.yaml", [*VIT_FT, *images(image_data)])
    with pytest.raises(UserError, match="references for MaskFeat and MFM, not for"):
        references(build_objective(cfg), cfg, torch.device("cpu"))
    cfg = load_config(HOG_OF_IMAGES[0], [*HOG_OF_IMAGES[1], *images(image_data), "TRAIN.BATCH_SIZE", "20"])
    with pytest.raises(UserError, match="needs at least 5 training batches"):
        references(build_objective(cfg), cfg, torch.device("cpu"))
